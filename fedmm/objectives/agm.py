"""AGM: Boosting Multi-modal Model Performance with Adaptive Gradient Modulation (Li et al., ICCV 2023).

A modality that does better than its own history, compared with the others, is slowed down; one that does worse is
sped up. Works with any fusion, as contributions come from leaving modalities out.

    f(S)   = fused logits with the modalities of S alone, f({}) = 0
    phi^m  = sum over S without m of |S|! (M - |S| - 1)! / M! (f(S + m) - f(S))             Shapley value
           = (f(m, n) - f(n) + f(m)) / 2 for two modalities m, n
    s^m    = mean_i CE(phi^m, y);  r^m = exp(mean of the others' s - s^m)                    large: m is ahead
    tau^m  = the same of the running means of s over the round's batches, this one included
    g      <- exp(alpha min(tau^m - r^m, cap)) g      for the tensors of modality m
    L      = CE(out, y)

State: running means of s^m and the number of batches in them, kept over the steps; in a step the factor of each
modality. Messages: none besides the model.
Differences from the paper: the running means begin anew each round, since a client keeps nothing. More than two
modalities: a score is compared with the mean of the others. Scores run over the samples that have every given
modality; a batch without any, and a uni-modal client, is not modulated. Absent means what it means to the model (a
feature of zero), not an input of zero. The exponents of r and tau end at 60, so that they stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedmm.models.blocks import block_of, modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean, per_client
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class AdaptiveModulation(Objective):
    """AGM's local objective.

    Attributes:
        alpha: Strength of the modulation (0: off).
        cap: Largest tau - r that counts.
    """

    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"coefficient"})
    alpha: NonNegativeFloat = 1.0
    cap: NonNegativeFloat = 10.0

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """No history."""
        if len(data.modalities) < 2:
            return {}
        shape = broadcast["round"].shape
        some = next(iter(data.x.values()))
        return {"kept.mean": some.new_zeros(*shape, len(data.modalities)), "kept.count": some.new_zeros(shape)}

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """CE(out, y), one optimiser step; leaves the factor of each given modality for the gradients."""
        features = model.encode(batch.x, batch.present)
        out = model.decide(features, batch.present)
        if len(features) > 1:
            complete = torch.stack(list(batch.present.values())).all(0)
            phi = contributions(model, features, batch.present)
            scores = torch.stack([masked_mean(cross_entropy(o, batch.y), complete) for o in phi.values()], -1)
            usable = complete.any(-1)
            state["kept.count"] = state["kept.count"] + usable
            share = usable / state["kept.count"].clamp(min=1)
            state["kept.mean"] = state["kept.mean"] + share.unsqueeze(-1) * (scores - state["kept.mean"])
            factor = factors(scores, state["kept.mean"], self.alpha, self.cap)
            factor = torch.where(usable.unsqueeze(-1), factor, 1.0)
            state |= {f"factor.{m}": factor[..., slot] for slot, m in enumerate(features)}
        return (batch.mean(cross_entropy(out.logits, batch.y)),)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """The factor of each modality's gradients in the batch."""
        return {n.replace("factor", "coefficient"): k for n, k in state.items() if n.startswith("factor.")}

    def edit_gradients(self, gradients: Tensors, parameters: Tensors, state: Tensors) -> Tensors:
        """Scale the gradients of each modality's tensors by its factor."""
        scale = {n: state.get(f"factor.{modality_of(block_of(n))}") for n in gradients}
        return {n: g if (k := scale[n]) is None else per_client(k, g) * g for n, g in gradients.items()}


@torch.no_grad()
def contributions(model: MultimodalModel, features: Tensors, present: Tensors) -> Tensors:
    """phi^m [..., B, C] of each modality in `features` (h^m [..., B, d]), no gradient; they add up to f(all)."""
    names = tuple(features)
    count = len(names)
    f: dict[tuple[str, ...], Tensor] = {}
    for size in range(1, count + 1):
        for some in combinations(names, size):
            f[some] = model.decide({m: features[m] for m in some}, {m: present[m] for m in some}).logits
    f[()] = torch.zeros_like(f[names])
    phi: Tensors = dict.fromkeys(names, f[()])
    for some in f:
        for m in some:
            rest = tuple(n for n in some if n != m)
            weight = factorial(len(rest)) * factorial(count - len(rest) - 1) / factorial(count)
            phi[m] = phi[m] + weight * (f[some] - f[rest])
    return phi


def factors(scores: Tensor, means: Tensor, alpha: float, cap: float) -> Tensor:
    """exp(alpha min(tau - r, cap)) [..., M] from scores s^m and their running means [..., M]."""
    tau, r = (_ahead(s) for s in (means, scores))
    return torch.exp(alpha * (tau - r).clamp(max=cap))


def _ahead(scores: Tensor) -> Tensor:
    others = (scores.sum(-1, keepdim=True) - scores) / (scores.shape[-1] - 1)
    return torch.exp((others - scores).clamp(max=60.0))
