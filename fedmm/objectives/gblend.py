"""G-Blend: What Makes Training Multi-Modal Classification Networks Hard? (Wang, Tran, Feiszli, CVPR 2020).

The joint prediction and each modality's own head are branches that generalise and overfit at different speeds. Each
branch's loss weighs as much as what it learns is worth: generalisation over squared overfitting.

    L   = sum_k w_k CE(z_k, y),  k = fused, 1 .. M;  z_fused = out, z_m = o^m;  sum w = 1
    T_k, V_k: loss of branch k on training and on held-out samples, before (0) and after (1) a super-epoch
    O   = (V_1 - T_1) - (V_0 - T_0);  G = V_0 - V_1;  w_k ~ |G_k| / O_k^2

The super-epoch is a round. Each client scores the received model before, and its own after training; the server adds
the sums of the round's clients up and sends the weights of the next one (`server/blending.py`). Before the first
figures all branches weigh the same. A client blends over the branches that it trains.

State: which samples are held out, the branches' weights, and losses before training.
Messages: one weight a branch down; four sums and two counts a branch up.
Differences from the paper: one run of the joint model, not separate runs of the branches from a snapshot, says how a
branch goes on (as in the online variant, each super-epoch anew). The held-out samples are a seeded fraction of the
client's training samples, the same in every round; they stay in the batches, with weight zero, and may share units
(speakers, subjects) with others, which flatters V. Sums run over the samples that have the modality. O^2 is at least
1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pydantic
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from fedmm import seeding
from fedmm.metrics.fields import Field, Fields, Sizes
from fedmm.metrics.local import predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean
from fedmm.types import Batch, ClientData, Outputs, Tensors

FUSED = "fused"


@dataclass(frozen=True)
class GradientBlending(Objective):
    """G-Blend's local objective.

    Attributes:
        held_out: Share of the client's training samples that are not trained on.
        split: Seed of their choice.
        adapt: Use the server's weights; off: all branches weigh the same (ablation).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"blend"})
    requires: ClassVar[frozenset[str]] = frozenset({"unimodal_heads"})
    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    held_out: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.1
    split: NonNegativeInt = 0
    adapt: bool = True

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """Weights, the held-out samples, and one pass of the received model over the local data."""
        some = next(iter(data.x.values()))
        equal = some.new_ones(broadcast["round"].shape)
        branches = (FUSED, *data.modalities)
        raw = {k: broadcast.get(f"blend.{k}", equal).to(some.dtype) if self.adapt else equal for k in branches}
        total = torch.stack(list(raw.values())).sum(0).clamp(min=1e-30)
        state = {f"weight.{k}": w / total for k, w in raw.items()}
        state["sample.held"] = held_out(data, self.held_out, self.split)
        return state | {f"before.{n}": t for n, t in self._sums(model, data, state).items()}

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """sum_k w_k CE(z_k, y) over the samples that are not held out; one optimiser step."""
        used = ~batch.rows(state["sample.held"])
        if batch.weight is not None:
            used = used & (batch.weight > 0)
        out = model(batch.x, batch.present)
        loss = torch.zeros_like(out.logits[..., 0, 0])
        for k, (logits, here) in _branches(out, batch.present, used).items():
            loss = loss + state[f"weight.{k}"] * masked_mean(cross_entropy(logits, batch.y), here)
        return (loss,)

    def end(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """Losses of every branch before and after training, as sums and counts."""
        after = self._sums(model, data, state)
        before = {n: state[f"before.{n}"] for n in after}
        counts = {n: t for n, t in after.items() if n.endswith("count")}
        sums = {f"blend.{n}.before": t for n, t in before.items() if n not in counts}
        sums |= {f"blend.{n}.after": t for n, t in after.items() if n not in counts}
        return sums | {f"blend.{n}": t for n, t in counts.items()}

    def report_fields(self, modalities: Sequence[str], size: Sizes) -> Fields:
        """Two losses and a count for every branch and part."""
        names = ("sum.before", "sum.after", "count")
        every = (FUSED, *modalities)
        return {f"blend.{k}.{part}.{name}": Field(()) for k in every for part in ("train", "held") for name in names}

    def _sums(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        out = predict(model, data)
        real = torch.ones_like(data.y, dtype=torch.bool) if data.real is None else data.real
        found: Tensors = {}
        for part, rows in (("train", ~state["sample.held"]), ("held", state["sample.held"])):
            for k, (logits, here) in _branches(out, data.present, rows & real).items():
                values = cross_entropy(logits, data.y).to(torch.float64)
                found[f"{k}.{part}.sum"] = torch.where(here, values, 0.0).sum(-1)
                found[f"{k}.{part}.count"] = here.sum(-1).to(torch.float64)
        return found


def _branches(out: Outputs, present: Tensors, used: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Branch -> logits [..., B, C] and the samples [..., B] that count for it."""
    own = {m: (logits, used & present[m]) for m, logits in out.modality_logits.items()}
    return {FUSED: (out.logits, used)} | own


def held_out(data: ClientData, share: float, seed: int) -> Tensor:
    """Which samples are never trained on, bool [..., N]: a function of how many a client has, and of the seed."""
    real = torch.ones_like(data.y, dtype=torch.bool) if data.real is None else data.real
    rows = []
    for count in real.sum(-1).flatten().tolist():
        chosen = torch.randperm(count, generator=seeding.torch_rng(seed, "held-out", count))[: round(share * count)]
        rows.append(torch.zeros(len(data), dtype=torch.bool).index_fill(0, chosen, True))
    return torch.stack(rows).reshape(data.y.shape).to(data.y.device)
