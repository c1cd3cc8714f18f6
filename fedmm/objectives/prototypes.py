"""CMSFed / BMSFed: Client-wise (Balanced) Modality Selection (Fan et al., arXiv 2401.00403 v1, v2 = ECCV 2024).

The local half of the method: a prototype cross-entropy lifts the weak modality (the server half, submodular
selection of clients and modalities, is `server/selection/balanced.py`).

    l_c^m(x) = - ||h^m(x) - C_c^m||_2          C_c^m: global prototype, the mean feature of class c in modality m
    L_PCE^m  = CE(l^m, y)
    rho      = sum_i softmax(l^1)_{y_i} / sum_i softmax(l^2)_{y_i}      of the batch; W = 2 if rho > 1 else 1
    L        = CE(out, y) + alpha L_PCE^W      trained with all modalities
    L        = CE(out, y) + alpha L_PCE^m      trained with modality m alone (the other halves of the fusion zero)

Variant v1: L_PCE uses the client's own prototypes (of the received model), and global prototypes align the weak
modality's features: + beta mean_i ||h^W(x_i) - C_{y_i}^W||_2. `weak: all` puts the term on every modality (the
FedProto-style control).

State: prototypes and which of them exist. Messages: prototypes down; per-class feature sums and counts up.
Differences from the paper: 1e-12 under the root of the alignment; a class without prototype is left out of the
softmax; more than two modalities: W is the one with the smallest sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedmm.metrics.local import class_sums, predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy
from fedmm.types import Batch, ClientData, Presence, Tensors

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
        """Global prototypes [C, d] of the owned modalities, and for v1 the client's own.

        While a modality has no global prototypes (the bootstrap epoch), the client's own serve as both.
        """
        names = data.modalities
        unmet = any(f"prototype.{m}" not in broadcast for m in names)
        local = local_prototypes(model, data) if unmet or self.variant == "v1" else {}
        sources = {"global": local | broadcast} | ({"local": local} if self.variant == "v1" else {})
        dtype, state = next(iter(data.x.values())).dtype, {}
        for kind, source in sources.items():
            state[kind] = torch.stack([source[f"prototype.{m}"].to(dtype) for m in names], -3)
            state[f"{kind}_known"] = torch.stack([source[f"prototype_count.{m}"] > 0 for m in names], -2)
        attracting = "local" if self.variant == "v1" else "global"
        known = state[f"{attracting}_known"]
        # Global prototypes are the same for all clients, and so is what their state consists of.
        if local or not bool(known.all()):
            state["known"] = known
        return state | _centred(state[attracting], known)

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        # All modalities side by side, [..., M, C, B]: as many operations as for one. Classes come before samples, as
        # a softmax over a short last axis takes ten times as long.
        features, (*leading, size) = tuple(out.features.values()), batch.y.shape
        with torch.no_grad():
            y = batch.y.view(*leading, 1, 1, size).expand(*leading, len(features), 1, size)
            share, votes = _shares(batch, y, state.get("known"), state["middle"].dtype)
            h = torch.stack(features, -3).to(state["middle"].dtype).sub_(state["middle"])
            logits = _logits(h, state)
            log_p = F.log_softmax(logits, -2)
            own = log_p.gather(-2, y)
            less = own.expm1()
            chosen = torch.ones_like(own[..., :1]) if self.weak == "all" else weak_modality(less, votes)
            share = share * chosen
            r = log_p.exp_().scatter_(-2, y, less).mul_(share).div_(logits)
        term = _log_likelihood(own, share, h, r, state["centred"], features)
        loss = torch.sub(batch.mean(cross_entropy(out.logits, batch.y)), term, alpha=self.alpha)
        if self.variant == "v1":
            y = y.squeeze(-2)
            has = torch.stack([batch.present[m] for m in out.features], -2) & state["global_known"].gather(-1, y)
            away = torch.stack(features, -3) - _of_class(state["global"], y)
            each = (away.square().sum(-1) + 1e-12).sqrt() * _mean_over(has, away.dtype)
            loss = loss + self.beta * (each * chosen.squeeze(-1)).sum((-2, -1))
        state["enhanced"] = chosen
        return (loss,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """1 for each modality that has the prototype loss in the batch, else 0."""
        chosen = state["enhanced"].flatten(-3)
        return {f"enhanced.{m}": chosen[..., slot] for slot, m in enumerate(batch.x)}


def _shares(batch: Batch, y: Tensor, known: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight of each sample in a modality's mean, and in the choice of the weak one, [..., M or 1, 1, B].

    The mean is over samples that have the modality and a prototype of their class, the choice over those that have
    every modality.

    Args:
        batch: Samples.
        y: Labels [..., M, 1, B].
        known: Which classes have a prototype, bool [..., M, C]; None: all.
        dtype: Of the weights.
    """
    weight = None if batch.weight is None else batch.weight.view(*batch.y.shape[:-1], 1, 1, -1)
    whole = isinstance(batch.present, Presence) and batch.present.whole.issuperset(batch.x)
    if whole and known is None and weight is not None and weight.dtype == dtype:
        return weight, weight
    have = torch.stack([batch.present[m] for m in batch.x], -2).unsqueeze(-2)
    complete = have.all(-3, keepdim=True)
    given = have if known is None else have & known.gather(-1, y.squeeze(-2)).unsqueeze(-2)
    return _mean_over(given, dtype), complete if weight is None else complete * weight


def _mean_over(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [..., B] of those that are `given` in their mean."""
    return given.to(dtype) / given.sum(-1, keepdim=True).clamp(min=1)


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


def _centred(prototypes: Tensor, known: Tensor) -> Tensors:
    """Prototypes [..., M, C, d] seen from their mean, for `_logits`; those unknown are far away.

    Lengths are then of the size of the distances, and their squares lose few digits.
    """
    c = prototypes.to(torch.promote_types(prototypes.dtype, torch.float32))
    middle = c.mean(-2, keepdim=True)
    c = c - middle
    squares = c.square().sum(-1, keepdim=True)
    return {
        "middle": middle,
        "centred": c,
        "squares": torch.where(known.unsqueeze(-1), squares, _FAR**2),
        # Below that there are no digits left, and the direction of a gradient would be rounding alone.
        "least": (4 * torch.finfo(c.dtype).eps * squares.amax(-2, keepdim=True)).clamp(min=_SMALL**2),
    }


def _logits(h: Tensor, state: Tensors) -> Tensor:
    """-||h - C_c||_2 of centred features [..., M, B, d], [..., M, C, B]."""
    length = torch.linalg.vector_norm(h, dim=-1).unsqueeze(-2)
    squares = torch.addcmul(state["squares"], length, length).sub_(state["centred"] @ h.mT, alpha=2)
    return torch.maximum(squares, state["least"]).sqrt_().neg_()


def _log_likelihood(own: Tensor, share: Tensor, h: Tensor, r: Tensor, c: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Sum over modalities and samples of share log p_y, [...], whose gradient with respect to h has a closed form.

    - sum_c r_c (h - C_c),    r_c = share (1[c = y] - p_c) / ||h - C_c||

    Args:
        own: log p_y [..., M, 1, B].
        share: [..., M, 1, B].
        h: Centred features [..., M, B, d].
        r: [..., M, C, B].
        c: Centred prototypes [..., M, C, d].
        features: The features h was made of, [..., B, d] each.
    """
    if h.dim() > 3:
        return cast(Tensor, _Sloped.apply(own, share, h, r, c, *features))  # type: ignore[no-untyped-call]
    with torch.no_grad():
        value, slopes = (own * share).sum(), _slopes(h, r, c)
    line = torch.stack([(x * slope).sum() for x, slope in zip(features, slopes, strict=True)]).sum()
    return value + (line - line.detach())


class _Sloped(torch.autograd.Function):
    """`_log_likelihood` of a stack."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, share: Tensor, h: Tensor, r: Tensor, c: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(h, r, c)
        return (own * share).sum((-3, -2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, r, c = ctx.saved_tensors
        return None, None, None, None, None, *_slopes(h, r * gradient.view(-1, 1, 1, 1), c)


def _slopes(h: Tensor, r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """The gradient that `_log_likelihood` names, [..., B, d] of each modality."""
    r = r.mT
    return (r @ c).addcmul_(h, r.sum(-1, keepdim=True), value=-1).unbind(-3)


def weak_modality(truth: Tensor, votes: Tensor) -> Tensor:
    """1 for the modality with the smallest sum of true-class probabilities, 0 for the others, [..., M, 1, 1].

    Args:
        truth: softmax(l^m)_{y_i}, or less the same for all, [..., M, 1, B].
        votes: Weight of each sample [..., 1, 1, B]; a single modality is enhanced whatever they are.
    """
    sums = (truth * votes).sum(-1, keepdim=True)
    return torch.zeros_like(sums).scatter_(-3, sums.argmin(-3, keepdim=True), 1.0)
