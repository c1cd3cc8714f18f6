"""Data Remixing: Improving Multimodal Learning Balance and Sufficiency (Ma et al., ICML 2025, arXiv 2506.11550).

Each sample keeps only the modality that has learned least about it, and each batch holds one modality, so that no
modality suppresses another and their gradients do not clash inside a batch.

    warm-up      L = CE(out, y) + warmup_weight sum_m CE(o^m, y)                     Eq. 1
    assignment   m*_i = argmin_m D_KL(softmax(o^m(x_i)) || U) = argmax_m entropy     Eq. 2, 3
                 D_m = {i : m*_i = m}, every other modality of i is left out         Eq. 7, 8
    afterwards   every batch from one D_m:  L = CE(out(m alone), y) + weight CE(o^m, y)      Eq. 9, 10

The received global model assigns, once a round; with `reassign: epoch` the model in training assigns anew before each
further local epoch (Algorithm 1). A client none of whose batches had m sends no block of m: it has no say there.

State: whether the warm-up is over, the weight, and for each modality which samples keep it.
Messages: none besides the model; with `report_subsets` |D_m| up.
Differences from the paper: warm-up in rounds, assignment in rounds; argmin over the modalities that a sample has.
`mask: skip` leaves the other encoders out of the batch, which equals Eq. 10 and leaves their statistics and weights
alone; `feature` (the authors' code) runs them and zeroes their output, `input` (Eq. 7 to the letter) zeroes the input.
Clients train one by one: subsets of unequal sizes give each its own number and order of unimodal batches, and an
encoder that a batch skips must not move, not even by momentum; a stack would have to compute every encoder in every
step, and to hold back single clients' updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from fedmm.metrics.fields import Field, Fields, Sizes
from fedmm.metrics.local import predict
from fedmm.models.blocks import modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, masked_mean
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class Remixing(Objective):
    """Data Remixing's local objective.

    Attributes:
        warmup_rounds: First round (from 0) with assignment.
        warmup_weight: Weight of the own heads' cross-entropies before.
        weight: Weight of the kept modality's cross-entropy afterwards.
        mask: What becomes of the modalities that a sample does not keep.
        order: Batches of the subsets in random order, or subset after subset in slot order.
        reassign: Who keeps what is decided once a round, or before each local epoch.
        report_subsets: Tell the server how many samples keep each modality (strategy `subset` weighs clients by it).
        reassemble: Draw every batch from one subset; without it samples are masked but batches stay mixed (ablation).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"unimodal_heads"})
    least_modalities: ClassVar[int] = 2
    acts: ClassVar[frozenset[str]] = frozenset({"assigned"})
    skips: ClassVar[str] = "a batch has one modality alone"
    alone: ClassVar[str] = "unequal subsets give each client its own number and order of batches"
    warmup_rounds: NonNegativeInt = 5
    warmup_weight: NonNegativeFloat = 0.5
    weight: NonNegativeFloat = 1.0
    mask: Literal["skip", "feature", "input"] = "skip"
    order: Literal["interleave", "blocked"] = "interleave"
    reassign: Literal["round", "epoch"] = "round"
    report_subsets: bool = False
    reassemble: bool = True

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """After the warm-up one pass of the received model over the local data assigns every sample."""
        remix = broadcast["round"] >= self.warmup_rounds
        kept = assign(predict(model, data).modality_logits, data.present) if bool(remix) else data.present
        state = {f"sample.kept.{m}": mask.clone() for m, mask in kept.items()}
        weight = torch.where(remix, self.weight, self.warmup_weight)
        return state | {"remix": remix, "own_weight": weight}

    def renew(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """With `reassign: epoch` the model in training assigns, once the warm-up is over."""
        if self.reassign == "round" or not bool(state["remix"]):
            return {}
        return {
            f"sample.kept.{m}": kept for m, kept in assign(predict(model, data).modality_logits, data.present).items()
        }

    def batches(self, data: ClientData, state: Tensors, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of one epoch, each from one subset; as the base during the warm-up."""
        if not bool(state["remix"]):
            yield from super().batches(data, state, size, generator)
            return
        subsets = {m: state[f"sample.kept.{m}"].nonzero().squeeze(1) for m in data.modalities}
        subsets = {m: rows for m, rows in subsets.items() if len(rows)}
        data = data.only(tuple(subsets))
        if not self.reassemble:
            yield from super().batches(data, state, size, generator)
            return
        parts = []
        for m, rows in subsets.items():
            order = rows[torch.randperm(len(rows), generator=generator)]
            shown = data.only((m,)) if self.mask == "skip" else data
            parts += [(shown, part) for part in torch.split(order, size)]
        turns = list(range(len(parts)))
        if self.order == "interleave":
            turns = torch.randperm(len(parts), generator=generator).tolist()
        for turn in turns:
            shown, rows = parts[turn]
            yield shown.batch(rows)

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        kept = {m: state[f"sample.kept.{m}"][batch.index] for m in batch.x}
        if self.mask == "input":
            x = {m: torch.where(kept[m].reshape(-1, *[1] * (x.dim() - 1)), x, 0.0) for m, x in batch.x.items()}
            out = model(x, batch.present)
        else:
            seen = kept if self.mask == "skip" else batch.present
            features = model.encode(batch.x, seen)
            out = model.decide({m: torch.where(kept[m].unsqueeze(1), h, 0.0) for m, h in features.items()}, kept)
        loss = F.cross_entropy(out.logits, batch.y)
        for m, logits in out.modality_logits.items():
            own = F.cross_entropy(logits, batch.y, reduction="none")
            loss = loss + state["own_weight"] * masked_mean(own, kept[m])
        return (loss,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """Which samples keep each modality, once the warm-up is over; also of modalities that the batch leaves out."""
        kept = {n.removeprefix("sample.kept."): mask for n, mask in state.items() if n.startswith("sample.kept.")}
        return {f"assigned.{m}": batch.rows(mask) & state["remix"] for m, mask in kept.items()}

    def end(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """|D_m| of the last assignment; in the warm-up, how many samples have m."""
        if not self.report_subsets:
            return {}
        return {f"subset.{m}": state[f"sample.kept.{m}"].sum().to(torch.float64) for m in data.modalities}

    def report_fields(self, modalities: Sequence[str], size: Sizes) -> Fields:
        """A count a modality, if asked for."""
        return {f"subset.{m}": Field(()) for m in modalities} if self.report_subsets else {}

    def optional_blocks(self, blocks: Iterable[str], modalities: Sequence[str]) -> tuple[str, ...]:
        """Every block of a single modality: its subset may be empty."""
        return tuple(b for b in self.trained_blocks(blocks, modalities) if modality_of(b) is not None)


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """D_KL(softmax(o) || U) = log C - entropy, [B], from logits [B, C] (Eq. 2)."""
    log_p = F.log_softmax(logits, 1)
    return (log_p.exp() * log_p).sum(1) + math.log(logits.shape[1])


def assign(logits: Tensors, present: Tensors) -> Tensors:
    """Which samples keep which modality: of those present the one of the smallest divergence (Eq. 3).

    Args:
        logits: Modality -> logits of its own head [N, C].
        present: Modality -> bool [N].

    Returns:
        Modality -> bool [N]; each sample keeps exactly one, the first of equals.
    """
    rows = [torch.where(present[m], divergence_from_uniform(o), torch.inf) for m, o in logits.items()]
    keep = torch.stack(rows).argmin(0)
    return {m: keep == slot for slot, m in enumerate(logits)}
