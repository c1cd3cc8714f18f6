"""MOON-style: Model-Contrastive Federated Learning (Li, He, Song, CVPR 2021), with the previous global model.

Local features are drawn to those of the received global model and pushed away from an older model's.

    l_con = - log( exp(sim(z, z_glob) / tau) / (exp(sim(z, z_glob) / tau) + exp(sim(z, z_prev) / tau)) )
    L     = CE(out, y) + mu mean_i l_con                    sim: cosine; z = [h^1; ...; h^M], zeros where absent

`level: modality` takes z = h^m for each modality, and adds up their means over the samples that have it.

State: features of every sample under the received and the older model. Messages: the older model's encoders down, which
nearly doubles what a client is sent.
Difference from the paper: there z_prev is the client's own local model of its last round. A client keeps nothing here,
and a server that kept every client's model would need K of them, and to see them one by one. z_prev is the global model
of the round before, the same for all: what it holds back is the pull to the past, not a client's own drift. The first
round has no older model, and no contrast. Features are the encoders' outputs, without the paper's projection head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from fedmm.metrics.local import predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class ModelContrast(Objective):
    """MOON's local objective, against the previous global model.

    Attributes:
        mu: Weight of the contrast (0: off).
        tau: Temperature.
        level: Contrast the concatenated features, or each modality's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"previous"})
    stacks: ClassVar[bool] = True
    mu: NonNegativeFloat = 1.0
    tau: PositiveFloat = 0.5
    level: Literal["joint", "modality"] = "joint"

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """One pass of each model over the local data; none where there is nothing to contrast with."""
        older = {n.removeprefix("model."): t for n, t in broadcast.items() if n.startswith("model.")}
        if not older or not self.mu:
            return {}
        other = copy.deepcopy(model)
        other.load_state_dict(older, strict=False)
        state: Tensors = {}
        for kind, network in (("global", model), ("previous", other)):
            features = predict(network, data).features
            state |= {f"sample.{kind}.{m}": h for m, h in features.items()}
        return state

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        loss = batch.mean(cross_entropy(out.logits, batch.y))
        if not state:
            return (loss,)
        kinds = [out.features] + [
            {m: batch.rows(state[f"sample.{kind}.{m}"]) for m in batch.x} for kind in ("global", "previous")
        ]
        if self.level == "joint":
            term = contrast([torch.cat(list(of.values()), -1) for of in kinds], self.tau)
            return (loss + self.mu * masked_mean(term, torch.stack(list(batch.present.values())).any(0)),)
        for m, here in batch.present.items():
            loss = loss + self.mu * masked_mean(contrast([of[m] for of in kinds], self.tau), here)
        return (loss,)


def contrast(features: Sequence[Tensor], tau: float) -> Tensor:
    """l_con of every sample, [..., B], from z, z_glob and z_prev, [..., B, d] each."""
    near, far = (F.cosine_similarity(features[0], other, dim=-1) for other in features[1:])
    return F.softplus((far - near) / tau)
