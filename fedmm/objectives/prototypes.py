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
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from fedmm.metrics.local import class_sums, predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy
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
        return state | _centred(state[attracting], state[f"{attracting}_known"])

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        source = "local" if self.variant == "v1" else "global"
        # All modalities side by side, [..., M, B, d]: as many operations as for one.
        features = tuple(out.features.values())
        present = torch.stack([batch.present[m] for m in out.features], -2)
        y = batch.y.unsqueeze(-2).expand(present.shape)
        given = present & state[f"{source}_known"].gather(-1, y)
        with torch.no_grad():
            h = torch.stack(features, -3) - state["middle"]
            distance = _distances(h, state)
            logp = F.log_softmax(-distance, -2)
            own = logp.gather(-2, y.unsqueeze(-2)).squeeze(-2)
            every = self.weak == "all"
            chosen = own.new_ones(own.shape[:-1]) if every else weak_modality(own.exp(), present)
            shares = self.alpha * _shares(given, chosen)
            slopes = _slopes(h, distance, logp.exp(), y, shares, state)
        term = _with_slopes(-(shares * own).sum((-2, -1)), features, slopes)
        if self.variant == "v1":
            away = torch.stack(features, -3) - _of_class(state["global"], y)
            given = present & state["global_known"].gather(-1, y)
            term = term + ((away.square().sum(-1) + 1e-12).sqrt() * (self.beta * _shares(given, chosen))).sum((-2, -1))
        state |= {f"enhanced.{m}": chosen[..., slot] for slot, m in enumerate(out.features)}
        return (batch.mean(cross_entropy(out.logits, batch.y)) + term,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """1 for each modality that has the prototype loss in the batch, else 0."""
        return {n: chosen for n, chosen in state.items() if n.startswith("enhanced.")}


def _shares(given: Tensor, chosen: Tensor) -> Tensor:
    """Weight [..., M, B] of each sample in the mean over those `given`, of the modalities `chosen` [..., M]."""
    return given * (chosen / given.sum(-1).clamp(min=1)).unsqueeze(-1)


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
    """Prototypes [..., M, C, d] seen from their mean, for `_distances`; those unknown are far away.

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


def _distances(h: Tensor, state: Tensors) -> Tensor:
    """||h - C_c||_2 of centred features [..., M, B, d], [..., M, C, B].

    Classes come before samples: a softmax over a short last axis takes ten times as long.
    """
    own = torch.linalg.vector_norm(h, dim=-1).square().unsqueeze(-2)
    lengths, c = own + state["squares"], state["centred"]
    squares = torch.baddbmm(lengths.flatten(0, -3), c.flatten(0, -3), h.flatten(0, -3).transpose(1, 2), alpha=-2)
    return torch.maximum(squares.view(lengths.shape), state["least"]).sqrt()


def _slopes(h: Tensor, distance: Tensor, p: Tensor, y: Tensor, shares: Tensor, state: Tensors) -> Tensor:
    """Gradient of sum_i shares_i CE(l, y)_i with respect to h, [..., M, B, d], in closed form.

    sum_c r_c (h - C_c),    r_c = shares (1[c = y] - p_c) / ||h - C_c||
    """
    shares = shares.unsqueeze(-2)
    r = (p * -shares).scatter_add(-2, y.unsqueeze(-2), shares) / distance
    c, flat = state["centred"].flatten(0, -3), r.flatten(0, -3).transpose(1, 2)
    return (h * r.sum(-2).unsqueeze(-1)).flatten(0, -3).baddbmm(flat, c, alpha=-1).view(h.shape)


def _with_slopes(value: Tensor, inputs: Sequence[Tensor], slopes: Tensor) -> Tensor:
    """`value` [...], whose gradient with respect to input m [..., B, d] is slopes[..., m, :, :]."""
    lines = [(x * slope).sum((-2, -1)) for x, slope in zip(inputs, slopes.unbind(-3), strict=True)]
    line = torch.stack(lines).sum(0)
    return value + (line - line.detach())


def weak_modality(truth: Tensor, present: Tensor) -> Tensor:
    """1 for the modality with the smallest sum of true-class probabilities, 0 for the others, [..., M].

    A single modality is always enhanced. Sums run over samples that have every modality given.

    Args:
        truth: softmax(l^m)_{y_i} [..., M, B].
        present: bool [..., M, B].
    """
    sums = torch.where(present.all(-2, keepdim=True), truth, 0.0).sum(-1)
    slots = torch.arange(sums.shape[-1], device=sums.device)
    return (slots == sums.argmin(-1, keepdim=True)).to(sums.dtype)
