"""Joint training, with FedProx's proximal term or auxiliary unimodal heads: the baselines.

    joint      L = CE(out, y)
    prox       L = CE(out, y) + (mu/2) ||w - w_hat||^2          Li et al., MLSys 2020
    auxiliary  L = CE(out, y) + weight * sum_m CE(o^m, y)       o^m: linear head on encoder m

State: prox keeps the received parameters ("anchor."). Messages: none besides the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import NonNegativeFloat
from torch import Tensor

from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, anchor, cross_entropy, masked_mean, proximal
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class Joint(Objective):
    """Cross-entropy of the fused prediction (FedAvg's local objective)."""

    stacks: ClassVar[bool] = True

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """CE(out, y), mean over the batch."""
        return (batch.mean(cross_entropy(model(batch.x, batch.present).logits, batch.y)),)


@dataclass(frozen=True)
class Prox(Joint):
    """Cross-entropy plus FedProx's proximal term on all trained parameters.

    Attributes:
        mu: Strength of (mu/2) ||w - w_hat||^2.
    """

    stacks: ClassVar[bool] = True
    mu: NonNegativeFloat = 0.01

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """Keep the received weights w_hat."""
        return anchor(model)

    def edit_gradients(self, gradients: Tensors, parameters: Tensors, state: Tensors) -> Tensors:
        """Add mu (w - w_hat)."""
        return proximal(gradients, parameters, state, self.mu)


@dataclass(frozen=True)
class Auxiliary(Objective):
    """Joint cross-entropy plus one cross-entropy for each modality's own head.

    Attributes:
        weight: Weight of the unimodal terms.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"unimodal_heads"})
    stacks: ClassVar[bool] = True
    weight: NonNegativeFloat = 1.0

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """CE(out, y) + weight * sum_m CE(o^m, y), each mean over the samples that have m."""
        out = model(batch.x, batch.present)
        loss = batch.mean(cross_entropy(out.logits, batch.y))
        for m, logits in out.modality_logits.items():
            loss = loss + self.weight * masked_mean(cross_entropy(logits, batch.y), batch.present[m])
        return (loss,)
