"""PMR: Prototypical Modal Rebalance for Multimodal Learning (Fan et al., CVPR 2023).

Whichever modality is behind in the batch gets a loss of its own, which needs no head: distances to class prototypes.

    C_c^m    = mean feature of class c in modality m, of the client's own samples
    l_c^m(x) = - ||h^m(x) - C_c^m||_2;  s^m = sum_i softmax(l^m)_{y_i}
    L        = CE(out, y) + alpha CE(l^W, y) - entropy H(softmax(l^S))
    W: the slower modality, of the smallest s^m of the batch; S: the faster one, of the largest

Prototypes are of the received model in the first local epoch, and renewed with the model in training before each
further one: C <- (1 - memory) C_new + memory C. The entropy keeps the faster modality from settling early; it acts in
the first `entropy_rounds` rounds and is off by default, as in the authors' code.

State: prototypes and which of them exist. Messages: none besides the model.
Differences from the paper: the mean is over all samples instead of a tenth of the batches. Prototypes begin anew each
round, since a client keeps nothing. The coefficient of the slower modality is alpha, of the other 0 (the authors'
code), not graded by the ratio of scores. More than two modalities: smallest and largest score. Uni-modal clients train
CE(out, y) alone. 1e-12 under the root.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pydantic
import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean, true_class_confidence
from fedmm.objectives.prototypes import distance_logits, local_prototypes
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class PrototypicalRebalance(Objective):
    """PMR's local objective.

    Attributes:
        alpha: Weight of the slower modality's prototype cross-entropy (0: off).
        memory: Share of the old prototypes when they are renewed.
        entropy: Weight of the faster modality's entropy (0: off).
        entropy_rounds: First round (from 0) without it.
    """

    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"enhanced"})
    alpha: NonNegativeFloat = 1.0
    memory: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.2
    entropy: NonNegativeFloat = 0.0
    entropy_rounds: NonNegativeInt = 5

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """One pass of the received model over the local data: prototypes [C, d] of the owned modalities."""
        if len(data.modalities) < 2:
            return {}
        found = local_prototypes(model, data)
        dtype = next(iter(data.x.values())).dtype
        state = {"entropy": (broadcast["round"] < self.entropy_rounds).to(dtype) * self.entropy}
        for m in data.modalities:
            state[f"prototype.{m}"] = found[f"prototype.{m}"].to(dtype)
            state[f"known.{m}"] = found[f"prototype_count.{m}"] > 0
        return state

    def renew(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """C <- (1 - memory) C_new + memory C."""
        if len(data.modalities) < 2:
            return {}
        found = local_prototypes(model, data)
        old = {f"prototype.{m}": state[f"prototype.{m}"] for m in data.modalities}
        return {n: (1 - self.memory) * found[n].to(t.dtype) + self.memory * t for n, t in old.items()}

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        loss = batch.mean(cross_entropy(out.logits, batch.y))
        if len(batch.x) < 2:
            return (loss,)
        logits = {m: distance_logits(h, state[f"prototype.{m}"], state[f"known.{m}"]) for m, h in out.features.items()}
        scores = true_class_confidence(logits, batch.present, batch.y)
        slower, faster = (F.one_hot(at, len(logits)) for at in (scores.argmin(-1), scores.argmax(-1)))
        state |= {f"enhanced.{m}": slower[..., slot] for slot, m in enumerate(logits)}
        for slot, (m, l_m) in enumerate(logits.items()):
            usable = batch.present[m] & state[f"known.{m}"].gather(-1, batch.y)
            loss = loss + self.alpha * slower[..., slot] * masked_mean(cross_entropy(l_m, batch.y), usable)
            if self.entropy:
                loss = loss - state["entropy"] * faster[..., slot] * masked_mean(entropy(l_m), batch.present[m])
        return (loss,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """1 for the slower modality of the batch, else 0."""
        return {n: chosen for n, chosen in state.items() if n.startswith("enhanced.")}


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(l)) of every sample, [..., B], from logits [..., B, C]; classes without a prototype add nothing."""
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)
