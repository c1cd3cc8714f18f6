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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
    alpha: float = 2.0
    variant: Literal["v2", "v1"] = "v2"
    beta: float = 1.0
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
        return state

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        source = "local" if self.variant == "v1" else "global"
        # All modalities side by side, [..., M, B]: as many operations as for one.
        present = torch.stack([batch.present[m] for m in out.features], -2)
        y = batch.y.unsqueeze(-2).expand(present.shape)
        known = state[f"{source}_known"]
        each = prototype_cross_entropy(tuple(out.features.values()), state[source], known, batch.y)
        given = present & known.gather(-1, y)
        every = self.weak == "all"
        chosen = each.new_ones(each.shape[:-1]) if every else weak_modality((-each.detach()).exp(), present)
        # One weight a sample instead of a mean a modality: this way autograd has nothing to do for masks and choices.
        term = (each * (self.alpha * _shares(given, chosen))).sum((-2, -1))
        if self.variant == "v1":
            own = torch.stack(list(out.features.values()), -3) - _of_class(state["global"], y)
            distance = (own.square().sum(-1) + 1e-12).sqrt()
            given = present & state["global_known"].gather(-1, y)
            term = term + (distance * (self.beta * _shares(given, chosen))).sum((-2, -1))
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


def prototype_cross_entropy(features: Sequence[Tensor], prototypes: Tensor, known: Tensor, y: Tensor) -> Tensor:
    """CE(l, y) of every sample, [..., M, B], for the logits of `distance_logits`, by a few large operations.

    Args:
        features: h [..., B, d] of each of M modalities.
        prototypes: C [..., M, C, d], without gradient.
        known: Which classes have a prototype, bool [..., M, C]; samples of others get a finite number of no meaning.
        y: Labels [..., B].
    """
    found: Tensor = _PrototypeCrossEntropy.apply(prototypes, known, y, *features)[0]  # type: ignore[no-untyped-call]
    return found


class _PrototypeCrossEntropy(torch.autograd.Function):
    """The loss, and its gradient in closed form.

        dL/dh = sum_c r_c (h - C_c),    r_c = g (1[c = y] - p_c) / ||h - C_c||

    with p = softmax(l) and the incoming gradient g. Classes come before samples, [..., C, B]: softmax over a short
    last axis takes ten times as long.
    """

    @staticmethod
    def forward(prototypes: Tensor, known: Tensor, y: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        dtype = features[0].dtype
        c = prototypes.to(torch.promote_types(dtype, torch.float32))
        # Seen from the mean of the prototypes, lengths are of the size of the distances: squares lose few digits.
        middle = c.mean(-2, keepdim=True)
        c = c - middle
        h = c.new_empty(*c.shape[:-2], *features[0].shape[-2:])
        for slot, own in enumerate(features):
            torch.sub(own, middle.select(-3, slot), out=h.select(-3, slot))
        flat, centres = h.flatten(0, -3), c.flatten(0, -3)
        own_square = torch.linalg.vector_norm(flat, dim=-1).square_().unsqueeze(-2)
        lengths = own_square + torch.linalg.vector_norm(centres, dim=-1).square_().unsqueeze(-1)
        squares = torch.baddbmm(lengths, centres, flat.transpose(1, 2), alpha=-2)
        # Below that there are no digits left, and the direction of a gradient would be rounding alone.
        distance = torch.maximum(squares, lengths.mul_(4 * torch.finfo(c.dtype).eps)).sqrt_().view(*c.shape[:-1], -1)
        far = torch.where(known.unsqueeze(-1), distance, _FAR)
        nearest = far.amin(-2, keepdim=True)
        p = (nearest - far).exp_()
        total = p.sum(-2, keepdim=True)
        own = far.gather(-2, _along(y, h))
        p.div_(total)
        return total.log_().add_(own).sub_(nearest).squeeze(-2).to(dtype), h, c, distance, p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[2], *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        y, h, c, distance, p = ctx.saved_tensors
        g = gradient.unsqueeze(-2).to(h.dtype)
        r = (p * -g).scatter_add_(-2, _along(y, h), g).div_(distance.clamp(min=_SMALL)).flatten(0, -3)
        found = h.flatten(0, -3) * r.sum(-2).unsqueeze(-1)
        found = found.baddbmm_(r.transpose(1, 2), c.flatten(0, -3), alpha=-1).view(h.shape).to(gradient.dtype)
        return None, None, None, *found.unbind(-3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """One more leading axis."""
        whole = [
            t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0)
            for t, at in zip(inputs, in_dims, strict=True)
        ]
        return _PrototypeCrossEntropy.apply(*whole), 0  # type: ignore[no-untyped-call]


def _along(y: Tensor, h: Tensor) -> Tensor:
    """Labels [..., B] as places among the classes, [..., M, 1, B], of h [..., M, B, d]."""
    return y.unsqueeze(-2).unsqueeze(-2).expand(*h.shape[:-2], 1, -1)


def weak_modality(truth: Tensor, present: Tensor) -> Tensor:
    """1 for the modality with the smallest sum of true-class probabilities, 0 for the others, [..., M].

    A single modality is always enhanced. Sums run over samples that have every modality given.

    Args:
        truth: softmax(l^m)_{y_i} [..., M, B].
        present: bool [..., M, B].
    """
    sums = torch.where(present.all(-2, keepdim=True), truth, 0.0).sum(-1)
    return F.one_hot(sums.argmin(-1), sums.shape[-1]).to(sums.dtype)
