"""The values that every part of fedmm exchanges. Shapes: B batch, N samples, K clients, C classes, d features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
"""Named tensors: a model's state, an objective's state, a report."""

Kind: TypeAlias = Literal["image", "spectrogram", "text", "vector"]


@dataclass(frozen=True)
class ModalitySpec:
    """What one modality looks like.

    Attributes:
        kind: Picks the default encoder. "image" and "spectrogram" are [channels, height, width];
            "text" is a bag of hashed n-grams [buckets]; "vector" is [features].
        shape: Shape of one sample.
    """

    kind: Kind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """A pooled multimodal data set, split by unit, before it is spread over clients.

    Attributes:
        name: "avdigits:imbalanced", for instance.
        specs: Modality name -> spec, in the order that fixes slots (first = modality 1).
        classes: Class names; labels index it.
        x: Modality -> float32 array [N, *shape].
        y: Labels, int64 [N].
        split: 0 train, 1 validation, 2 test, int8 [N]. No unit is in two splits.
        unit: The unit (speaker, subject, code point ...) that a sample belongs to, int64 [N].
        present: Modality -> bool [N]; False where the source itself lacks the modality. An absent sample's
            `x` is never read.
        natural: Natural client of each sample, int64 [N], or None. -1 = belongs to no natural client.
        natural_names: Name of each natural client.
        sha256: Hash of the arrays, for the manifest.
    """

    name: str
    specs: dict[str, ModalitySpec]
    classes: tuple[str, ...]
    x: dict[str, npt.NDArray[np.float32]]
    y: npt.NDArray[np.int64]
    split: npt.NDArray[np.int8]
    unit: npt.NDArray[np.int64]
    present: dict[str, npt.NDArray[np.bool_]]
    natural: npt.NDArray[np.int64] | None = None
    natural_names: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modality names, in slot order."""
        return tuple(self.specs)


SPLITS = {"train": 0, "val": 1, "test": 2}


class Presence(dict[str, Tensor]):
    """Masks of presence that know which modalities no sample lacks: a model need not mask those.

    Args:
        masks: Modality -> bool [..., B]; False also in rows that only fill up a stack.
        whole: Modalities that every sample has, those that fill up included.
    """

    def __init__(self, masks: dict[str, Tensor], whole: frozenset[str]) -> None:
        super().__init__(masks)
        self.whole = whole


@dataclass(frozen=True)
class Batch:
    """What a model and an objective see of B samples: of one client, or of K clients stacked.

    In a stack every tensor has a leading axis of K clients, and each client's rows are filled up to a common B; rows
    beyond a client's own have no modality present and weight 0.

    Attributes:
        x: Modality -> float tensor [..., B, *shape]. A modality that the client does not own, or was told not to
            train, has no entry.
        present: Modality -> bool [..., B], same keys as `x`. Rows of `x` with False are never read.
        y: Labels, int64 [..., B].
        index: Row of each sample in the client's training data, int64 [..., B]; addresses per-sample state.
        weight: Share of each sample in its client's mean, [..., B]; None: 1 / B each.
    """

    x: Tensors
    present: Tensors
    y: Tensor
    index: Tensor
    weight: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it is known that no sample lacks a modality."""
        return isinstance(self.present, Presence) and self.present.whole.issuperset(self.x)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` [..., B] over a client's samples, [...]."""
        return values.mean(-1) if self.weight is None else (values * self.weight).sum(-1)

    def rows(self, state: Tensor, slot: Tensor | None = None) -> Tensor:
        """Rows [..., B, *rest] of per-sample state [..., N, *rest] that belong to this batch.

        Args:
            state: [..., N, *rest], or with `slot` [..., N, M, *rest].
            slot: Which of the M entries of a row, int64 [...].
        """
        index = self.index
        if slot is not None:
            index = index * state.shape[index.dim()] + slot.unsqueeze(-1)
            state = state.flatten(index.dim() - 1, index.dim())
        if index.dim() == 1:
            return state[index]
        start = torch.arange(len(index), device=index.device).unsqueeze(1) * state.shape[1]
        return state.flatten(0, 1).index_select(0, (index + start).flatten()).view(*index.shape, *state.shape[2:])


@dataclass(frozen=True)
class ClientData:
    """One split of one client as tensors; a modality that the client does not own has no entry.

    Attributes:
        x: Modality -> [..., N, *shape]; the leading axis, if any, stacks K clients (see `Batch`).
        present: Modality -> bool [..., N].
        y: Labels, int64 [..., N].
        classes: Number of classes C.
        real: bool [..., N], False in rows that only fill up a stack; None: all are real.
        whole: Modalities that no sample lacks.
    """

    x: Tensors
    present: Tensors
    y: Tensor
    classes: int
    real: Tensor | None = None
    whole: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return int(self.y.shape[-1])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Owned modalities, in slot order."""
        return tuple(self.x)

    def batch(self, index: Tensor | None = None) -> Batch:
        """Rows `index` (int64 [B]; all rows by default) as a batch."""
        if index is None:
            return Batch(self.x, self.present, self.y, torch.arange(len(self), device=self.y.device))
        index = index.to(self.y.device)
        return Batch(
            {m: x[index] for m, x in self.x.items()},
            Presence({m: p[index] for m, p in self.present.items()}, self.whole),
            self.y[index],
            index,
        )

    def only(self, modalities: Sequence[str]) -> ClientData:
        """The same samples without the other modalities."""
        return ClientData(
            {m: x for m, x in self.x.items() if m in modalities},
            {m: p for m, p in self.present.items() if m in modalities},
            self.y,
            self.classes,
            self.real,
            self.whole,
        )


@dataclass(frozen=True)
class Outputs:
    """What a multimodal model returns for a batch.

    Attributes:
        logits: Fused prediction [..., B, C].
        features: Modality -> encoder output h^m [..., B, d], zero where absent. Given modalities only.
        modality_logits: Modality -> logits of its own head [..., B, C]; empty for models without own heads.
        infiltration_logits: Modality -> logits of the own head on the infiltration feature [..., B, C]; empty for
            models without projectors.
    """

    logits: Tensor
    features: Tensors
    modality_logits: Tensors = field(default_factory=dict)
    infiltration_logits: Tensors = field(default_factory=dict)
