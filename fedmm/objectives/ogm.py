"""OGM-GE: Balanced Multimodal Learning via On-the-fly Gradient Modulation (Peng et al., CVPR 2022).

The encoder of the modality that leads in the batch is slowed down; Gaussian noise keeps the gradient's randomness.

    z^m   = W_m h^m + b / M                             part of the fused logits that m brings
    s^m   = sum_i softmax(z^m)_{y_i};  rho^m = s^m / s^other
    k^m   = 1 - tanh(alpha rho^m) if rho^m > 1, else 1
    g     <- k^m g + noise,  noise ~ N(0, std(g)^2)     for each tensor of encoder m (generalisation enhancement)
    L     = CE(out, y)

State: whether modulation is on in this round; in a step k^m (from the batch) and standard-normal noise (from the
client's stream of the seed tree). Messages: none besides the model.
Differences from the paper: more than two modalities: rho^m is relative to the smallest score (`reference: others`: to
the sum of the others). Any fusion: z^m is the fused logits with m alone, less those with nothing, plus 1 / M of the
latter, which is the line above for concatenation. Sums run over the samples that have every given modality. The
authors' code edits convolution kernels only (`tensors: convolution`), and stops halfway (`stop_round`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from fedmm.models.blocks import block_of, modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, per_client, true_class_confidence
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class GradientModulation(Objective):
    """OGM-GE's local objective.

    Attributes:
        alpha: Strength of the modulation (0: off).
        enhance: Add the noise (GE).
        reference: What a score is compared with: the smallest one, or the sum of the others.
        tensors: "all" of an encoder, or its "convolution" kernels (tensors with four axes).
        stop_round: First round (from 0) without modulation and noise; null: never.
    """

    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"coefficient"})
    alpha: NonNegativeFloat = 0.3
    enhance: bool = True
    reference: Literal["smallest", "others"] = "smallest"
    tensors: Literal["all", "convolution"] = "all"
    stop_round: NonNegativeInt | None = None

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """Whether this round is modulated."""
        round = broadcast["round"]
        on = torch.ones_like(round) if self.stop_round is None else round < self.stop_round
        return {"modulation": on.to(next(iter(data.x.values())).dtype)}

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """CE(out, y), one optimiser step; leaves k^m of each given modality for the gradients."""
        features = model.encode(batch.x, batch.present)
        out = model.decide(features, batch.present)
        if len(features) > 1:
            logits = contributions(model, features, batch.present)
            scores = true_class_confidence(logits, batch.present, batch.y)
            k = coefficients(scores, self.alpha, self.reference)
            k = 1 - state["modulation"].unsqueeze(-1) * (1 - k)
            state |= {f"coefficient.{m}": k[..., slot] for slot, m in enumerate(features)}
        return (batch.mean(cross_entropy(out.logits, batch.y)),)

    def noise(self, parameters: Tensors, generator: torch.Generator) -> Tensors:
        """Standard-normal tensors for the encoders' gradients."""
        if not self.enhance:
            return {}
        return {
            f"noise.{n}": torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in parameters.items()
            if self._edits(n, p)
        }

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """k^m of the batch."""
        return {n: k for n, k in state.items() if n.startswith("coefficient.")}

    def edit_gradients(self, gradients: Tensors, parameters: Tensors, state: Tensors) -> Tensors:
        """Scale each encoder's gradient by its k^m and add the noise; uni-modal clients' stay as they are."""
        edited = dict(gradients)
        on = state["modulation"]
        for n, g in gradients.items():
            m = modality_of(block_of(n))
            if self._edits(n, g, on.dim()) and f"coefficient.{m}" in state:
                edited[n] = per_client(state[f"coefficient.{m}"], g) * g
                each = g.flatten(on.dim())
                if self.enhance and each.shape[-1] > 1:
                    edited[n] = edited[n] + per_client(on * each.std(-1), g) * state[f"noise.{n}"]
        return edited

    def _edits(self, name: str, tensor: Tensor, leading: int = 0) -> bool:
        return block_of(name).startswith("encoder.") and (self.tensors == "all" or tensor.dim() - leading == 4)


@torch.no_grad()
def contributions(model: MultimodalModel, features: Tensors, present: Tensors) -> Tensors:
    """z^m [..., B, C] of each modality in `features` (h^m [..., B, d]), no gradient; see the module's text."""
    some = next(iter(features))
    nothing = model.decide({some: torch.zeros_like(features[some])}, {some: torch.zeros_like(present[some])}).logits
    share = 1 - 1 / len(features)
    return {m: model.decide({m: h}, {m: present[m]}).logits - share * nothing for m, h in features.items()}


def coefficients(scores: Tensor, alpha: float, reference: str) -> Tensor:
    """k^m [..., M] from the scores s^m [..., M]: below 1 for what leads, else 1."""
    other = scores.amin(-1, keepdim=True) if reference == "smallest" else scores.sum(-1, keepdim=True) - scores
    rho = scores / other.clamp(min=1e-8)
    return torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)
