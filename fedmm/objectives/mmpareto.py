"""MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance (Wei and Hu, ICML 2024).

The joint loss and a modality's own loss meet at its encoder. Where their gradients conflict, the step is the one that
hurts neither; where they do not, it is their sum. Lengthening keeps the strength of the stochastic gradient's noise.

    L_0 = CE(out, y);  L_m = CE(o^m, y);  g_0, g_m: their gradients at encoder m, at the same weights
    a     = 1/2 if <g_0, g_m> >= 0, else clip(<g_m - g_0, g_m> / ||g_0 - g_m||^2, 0, 1)      min-norm point of the two
    d     = 2 (a g_0 + (1 - a) g_m)
    g     <- gamma max(1, ||g_0 + g_m|| / ||d||) d                                             tensor by tensor
    heads and fusion: the sum of what reaches them

State: gamma. Messages: none besides the model.
Differences from the paper: whether the two conflict, and a, are decided for the whole encoder (`solve: tensor`: a for
each tensor of an encoder in conflict). Means run over the samples that have the modality. Uni-modal clients train the
sum of both losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from fedmm.models.blocks import block_of, modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean, per_client
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class ParetoIntegration(Objective):
    """MMPareto's local objective.

    Attributes:
        gamma: Factor of the encoders' gradients.
        solve: Balance the two gradients over an encoder, or over each of its tensors.
        integrate: Off: the plain sum of all losses (ablation).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"unimodal_heads"})
    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    one_step: ClassVar[bool] = True
    gamma: PositiveFloat = 1.5
    solve: Literal["encoder", "tensor"] = "encoder"
    integrate: bool = True

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """Gamma, one for each client; none where there is nothing to integrate."""
        if len(data.modalities) < 2 or not self.integrate:
            return {}
        return {"gamma": next(iter(data.x.values())).new_full(broadcast["round"].shape, self.gamma)}

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """CE(out, y) and CE(o^m, y) of each given modality, all for one optimiser step."""
        out = model(batch.x, batch.present)
        own = {m: cross_entropy(o, batch.y) for m, o in out.modality_logits.items()}
        return (
            batch.mean(cross_entropy(out.logits, batch.y)),
            *[masked_mean(values, batch.present[m]) for m, values in own.items()],
        )

    def combine(self, gradients: Sequence[Tensors], parameters: Tensors, state: Tensors) -> Tensors:
        """The Pareto direction where two losses meet at an encoder, the sum elsewhere."""
        together = super().combine(gradients, parameters, state)
        if "gamma" not in state:
            return together
        gamma, joint = state["gamma"], gradients[0]
        # A modality's own loss reaches no other modality's encoder.
        own = {n: g for each in gradients[1:] for n, g in each.items() if not n.startswith("head.")}
        encoders: dict[str | None, list[str]] = {}
        for n in own:
            if n in joint:
                encoders.setdefault(modality_of(block_of(n)), []).append(n)
        axes = gamma.dim()
        for names in encoders.values():
            conflict = torch.stack([_dot(joint[n], own[n], axes) for n in names]).sum(0) < 0
            groups = [names] if self.solve == "encoder" else [[n] for n in names]
            for group in groups:
                balance = torch.where(conflict, min_norm([joint[n] for n in group], [own[n] for n in group], axes), 0.5)
                for n in group:
                    a = per_client(balance, own[n])
                    d = 2 * (a * joint[n] + (1 - a) * own[n])
                    length, before = _dot(d, d, axes).sqrt(), _dot(together[n], together[n], axes).sqrt()
                    # Opposite gradients meet at zero; what rounding leaves of them there has no direction.
                    apart = _dot(joint[n], joint[n], axes).sqrt() + _dot(own[n], own[n], axes).sqrt()
                    some = length > torch.finfo(length.dtype).eps ** 0.5 * apart
                    longer = torch.where(some, before / length.clamp(min=1e-30), 1.0).clamp(min=1)
                    together[n] = per_client(gamma * longer, d) * d
        return together


def min_norm(first: Sequence[Tensor], second: Sequence[Tensor], axes: int) -> Tensor:
    """The a in [0, 1], [...], for which a * first + (1 - a) * second is shortest; `axes` leading axes stay."""
    pairs = list(zip(first, second, strict=True))
    along = torch.stack([_dot(u - g, u, axes) for g, u in pairs]).sum(0)
    apart = torch.stack([_dot(u - g, u - g, axes) for g, u in pairs]).sum(0)
    return torch.where(apart > 0, along / apart.clamp(min=1e-30), 0.5).clamp(0, 1)


def _dot(a: Tensor, b: Tensor, axes: int) -> Tensor:
    return (a * b).flatten(axes).sum(-1) if a.dim() > axes else a * b
