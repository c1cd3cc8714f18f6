"""CMSFed / BMSFed: Client-wise (Balanced) Modality Selection (Fan et al., arXiv 2401.00403 v1, v2 = ECCV 2024).

The local half of the method: a prototype cross-entropy lifts the weak modality (the server half, submodular
selection of clients and modalities, is `server/selection/submodular.py`).

    l_c^m(x) = - ||h^m(x) - C_c^m||_2          C_c^m: global prototype, the mean feature of class c in modality m
    L_PCE^m  = CE(l^m, y)
    rho      = sum_i softmax(l^1)_{y_i} / sum_i softmax(l^2)_{y_i}      of the batch; W = 2 if rho > 1 else 1
    L        = CE(out, y) + alpha L_PCE^W      trained with all modalities
    L        = CE(out, y) + alpha L_PCE^m      trained with modality m alone (the other halves of the fusion zero)

Variant v1: L_PCE uses the client's own prototypes (of the received model), and global prototypes align the weak
modality's features: + beta mean_i ||h^W(x_i) - C_{y_i}^W||_2. `weak: all` puts the term on every modality (the
FedProto-style control).

Its gradient is written down: dL/dh = sum_c dL/dl_c (h - C_c) / l_c, with dL/dl = weight (softmax(l) - 1[c = y]).

State: prototypes and which of them exist. Messages: prototypes down; per-class feature sums and counts up.
Differences from the paper: 1e-12 under the root of the alignment; a class without prototype is left out of the
softmax; more than two modalities: W is the one with the smallest sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedmm import native
from fedmm.metrics.local import class_sums, predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.native.centres import distances, pulls
from fedmm.objectives.base import Objective, cross_entropy
from fedmm.objectives.closed_form import hard, hard_slopes, mean_weights, whole_weights, with_gradient
from fedmm.types import Batch, ClientData, Tensors

_FAR = 1e4
"""Distance of a class without prototype: softmax ignores it."""

_SMALL = 1e-6
"""Least distance in a gradient: where a sample lies on a prototype there is none."""


@dataclass(frozen=True)
class Prototypes(Objective):
    """CMSFed's local objective.

    Attributes:
        alpha: Weight of the prototype cross-entropy.
        variant: "v2" (global prototypes) or "v1" (local prototypes and global alignment).
        beta: Weight of v1's alignment.
        weak: "batch": only the batch's weak modality; "all": every modality.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"prototypes"})
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"enhanced"})
    alpha: NonNegativeFloat = 2.0
    variant: Literal["v2", "v1"] = "v2"
    beta: NonNegativeFloat = 1.0
    weak: Literal["batch", "all"] = "batch"

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """Global prototypes [M, C, d] of the owned modalities, and for v1 the client's own.

        While a modality has no global prototypes (the bootstrap epoch), the client's own serve as both.
        """
        names, dtype, state = data.modalities, next(iter(data.x.values())).dtype, dict[str, Tensor]()
        unmet = any(f"prototype.{m}" not in broadcast for m in names)
        local = local_prototypes(model, data) if unmet or self.variant == "v1" else {}
        # Clients of a stack see the same global prototypes: what follows from them is found once.
        alike = data.y.dim() > 1 and not local
        given = {n: t[:1] for n, t in broadcast.items() if n.startswith("prototype")} if alike else broadcast
        sources = {"global": local | given} | ({"local": local} if self.variant == "v1" else {})
        for kind, source in sources.items():
            state[kind] = torch.stack([source[f"prototype.{m}"].to(dtype) for m in names], -3)
            state[f"{kind}_known"] = torch.stack([source[f"prototype_count.{m}"] > 0 for m in names], -2)
        attracting = "local" if self.variant == "v1" else "global"
        known = state[f"{attracting}_known"]
        # What the state consists of must not differ between clients either.
        if local or not bool(known.all()):
            state["known"] = known
        state |= _centres(state[attracting], known)
        return {n: t.expand(len(data.y), *t.shape[1:]) for n, t in state.items()} if alike else state

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        features = tuple(out.features.values())
        # All modalities side by side, [..., M, B, C]: as many operations as for one.
        with torch.no_grad():
            y = batch.y.unsqueeze(-2).expand(*batch.y.shape[:-1], len(features), -1).contiguous()
            h = torch.stack(features, -3).to(state["middle"].dtype)
            share, votes = _shares(batch, y, state.get("known"), h.dtype)
            logits = _distances(h, state)
            each, p = hard(logits, y)
            chosen = torch.ones_like(each[..., :1]) if self.weak == "all" else weak_modality((-each).expm1(), votes)
            weight = self.alpha * share * chosen
            slopes = _pulls(h, state, hard_slopes(p, y, weight).div_(logits)).to(features[0].dtype)
            term = (each * weight).sum((-2, -1))
        loss = batch.mean(cross_entropy(out.logits, batch.y)) + with_gradient(term, (slopes, features))
        if self.variant == "v1":
            has = torch.stack([batch.present[m] for m in out.features], -2) & state["global_known"].gather(-1, y)
            away = torch.stack(features, -3) - _of_class(state["global"], y)
            apart = (away.square().sum(-1) + 1e-12).sqrt() * mean_weights(has, away.dtype)
            loss = loss + self.beta * (apart * chosen).sum((-2, -1))
        state["enhanced"] = chosen
        return (loss,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """1 for each modality that has the prototype loss in the batch, else 0."""
        chosen = state["enhanced"].flatten(-2)
        return {f"enhanced.{m}": chosen[..., slot] for slot, m in enumerate(batch.x)}


def _shares(batch: Batch, y: Tensor, known: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight of each sample in a modality's mean, and in the choice of the weak one, [..., M or 1, B].

    The mean is over samples that have the modality and a prototype of their class, the choice over those that have
    every modality.

    Args:
        batch: Samples.
        y: Labels [..., M, B].
        known: Which classes have a prototype, bool [..., M, C]; None: all.
        dtype: Of the weights.
    """
    alike = whole_weights(batch, dtype)
    if alike is not None and known is None:
        return alike.unsqueeze(-2), alike.unsqueeze(-2)
    have = torch.stack([batch.present[m] for m in batch.x], -2)
    complete = have.all(-2, keepdim=True)
    given = have if known is None else have & known.gather(-1, y)
    return mean_weights(given, dtype), complete if batch.weight is None else complete * batch.weight.unsqueeze(-2)


def _of_class(centres: Tensor, y: Tensor) -> Tensor:
    """Each sample's centre, [..., B, d], from centres [..., C, d] and labels [..., B]."""
    return centres.gather(-2, y.unsqueeze(-1).expand(*y.shape, centres.shape[-1]))


def local_prototypes(model: MultimodalModel, data: ClientData) -> Tensors:
    """The client's own class means "prototype.m" [..., C, d] and counts "prototype_count.m" [..., C], float64."""
    features = predict(model, data).features
    found: Tensors = {}
    for m in data.modalities:
        total, count = class_sums(features[m], data.present[m], data.y, data.classes)
        found[f"prototype.{m}"] = total / count.clamp(min=1).unsqueeze(-1)
        found[f"prototype_count.{m}"] = count
    return found


def distance_logits(features: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """l_c(x) = -||h(x) - C_c||_2, [..., B, C]; classes without prototype get a logit that softmax ignores.

    Args:
        features: h [..., B, d].
        prototypes: C [..., C, d].
        known: Which classes have a prototype, bool [..., C].
    """
    # [..., B, C, d] is never made. Not by matrix products, whose rounding would depend on how many clients there are.
    wide = torch.promote_types(features.dtype, torch.float32)  # for which alone there are distances
    distance = torch.cdist(features.to(wide), prototypes.to(wide), compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(known.unsqueeze(-2), -distance.to(features.dtype), -_FAR)


def _centres(prototypes: Tensor, known: Tensor) -> Tensors:
    """What `_distances` and `_pulls` need of prototypes [..., M, C, d]; those unknown are far away.

    Seen from their mean, lengths are of the size of the distances, and their squares lose few digits.
    """
    c = prototypes.to(torch.promote_types(prototypes.dtype, torch.float32))
    middle = c.mean(-2, keepdim=True)
    squares = (c - middle).square().sum(-1, keepdim=True)
    return {
        "middle": middle,
        "centres": torch.where(known.unsqueeze(-1), c, _FAR / c.shape[-1] ** 0.5),
        # Below that there are no digits left, and the direction of a gradient would be rounding alone.
        "least": (4 * torch.finfo(c.dtype).eps * squares.amax(-2, keepdim=True)).clamp(min=_SMALL**2),
    }


def _distances(h: Tensor, state: Tensors) -> Tensor:
    """-||h - C_c||_2 of features [..., M, B, d], [..., M, B, C]."""
    if _natively(h, state["centres"], state["least"]):
        return distances(h, state["centres"], state["least"])
    h, c = h - state["middle"], state["centres"] - state["middle"]
    length, reach = (torch.linalg.vector_norm(t, dim=-1) for t in (h, c))
    squares = length.square().unsqueeze(-1) + reach.square().unsqueeze(-2) - 2 * (h @ c.mT)
    return torch.maximum(squares, state["least"]).sqrt_().neg_()


def _pulls(h: Tensor, state: Tensors, r: Tensor) -> Tensor:
    """sum_c r_c (h - C_c) [..., M, B, d] for factors [..., M, B, C]."""
    if _natively(h, state["centres"], r):
        return pulls(h, state["centres"], r)
    h, c = h - state["middle"], state["centres"] - state["middle"]
    return r.sum(-1, keepdim=True) * h - r @ c


def _natively(h: Tensor, *others: Tensor) -> bool:
    return h.dim() > 3 and native.usable(h, *others)


def weak_modality(truth: Tensor, votes: Tensor) -> Tensor:
    """1 for the modality with the smallest sum of true-class probabilities, 0 for the others, [..., M, 1].

    Args:
        truth: softmax(l^m)_{y_i}, or less the same for all, [..., M, B].
        votes: Weight of each sample [..., 1, B]; a single modality is enhanced whatever they are.
    """
    sums = (truth * votes).sum(-1, keepdim=True)
    return torch.zeros_like(sums).scatter_(-2, sums.argmin(-2, keepdim=True), 1.0)
