"""A data set spread over clients: who holds which samples of each split, and which modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmm.config.schema import ScenarioConfig
from fedmm.data.missing import drop_modalities, owners
from fedmm.data.partition import Indices, class_counts, heldout, partition
from fedmm.errors import ConfigError
from fedmm.seeding import numpy_rng
from fedmm.types import SPLITS, ClientData, Dataset, Tensors


@dataclass(frozen=True)
class Pool:
    """One split of all clients in one place: client k's samples are rows starts[k] : starts[k] + sizes[k].

    Attributes:
        x: Modality -> [N, *shape]; rows of a modality that their client lacks mean nothing.
        present: Modality -> bool [N].
        y: Labels, int64 [N].
        starts: int64 [K].
        sizes: int64 [K].
        classes: Number of classes C.
        complete: Modalities that no sample of a client that owns them lacks.
        owned: Modalities that each client's samples come with.
    """

    x: Tensors
    present: Tensors
    y: torch.Tensor
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    classes: int
    complete: frozenset[str]
    owned: tuple[tuple[str, ...], ...]

    def sample_bytes(self, modalities: Sequence[str]) -> int:
        """Bytes of one sample."""
        return sum(self.x[m][0].numel() * self.x[m].element_size() for m in modalities)

    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each client and class, int64 [K, C]."""
        home = np.repeat(np.arange(len(self.sizes)), self.sizes)
        cells = np.bincount(home * self.classes + self.y.cpu().numpy(), minlength=len(self.sizes) * self.classes)
        return cells.reshape(len(self.sizes), self.classes)

    def client(self, k: int) -> ClientData:
        """Client k's samples; shares memory with the pool."""
        rows = slice(int(self.starts[k]), int(self.starts[k] + self.sizes[k]))
        return ClientData(
            {m: self.x[m][rows] for m in self.owned[k]},
            {m: self.present[m][rows] for m in self.owned[k]},
            self.y[rows],
            self.classes,
            whole=self.complete.intersection(self.owned[k]),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Pool:
        """The same samples on another device, in another precision."""
        x = {m: t.to(device, dtype) for m, t in self.x.items()}
        return replace(self, x=x, present={m: t.to(device) for m, t in self.present.items()}, y=self.y.to(device))


@dataclass(frozen=True)
class Federation:
    """Clients 0..K-1 of a data set.

    Attributes:
        dataset: The pooled data.
        indices: Split name -> rows of `dataset` of each client, sorted; each row is in one place at most.
        owned: Modalities of each client, in slot order.
        present: Modality -> bool [N]: what is left after per-sample missing modalities.
        heldout: "complete" or "owned": what validation and test samples keep.
    """

    dataset: Dataset
    indices: dict[str, Indices]
    owned: tuple[tuple[str, ...], ...]
    present: dict[str, npt.NDArray[np.bool_]]
    heldout: str = "complete"
    _pools: dict[str, Pool] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.owned)

    def modalities(self, k: int, split: str) -> tuple[str, ...]:
        """Modalities that client k's samples of a split come with, in slot order."""
        complete = split != "train" and self.heldout == "complete"
        return self.dataset.modalities if complete else self.owned[k]

    def client(self, k: int, split: str) -> ClientData:
        """One split ("train", "val", "test") of client k as CPU tensors; modalities it does not own have no entry."""
        return self.pool(split).client(k)

    def pool(self, split: str) -> Pool:
        """One split of all clients, gathered once."""
        if split not in self._pools:
            self._pools[split] = self.gather(split)
        return self._pools[split]

    def gather(self, split: str) -> Pool:
        """`pool` without keeping it."""
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *self.indices[split]])
        sizes = np.array([len(r) for r in self.indices[split]], dtype=np.int64)
        owned = tuple(self.modalities(k, split) for k in range(len(self)))
        home = np.repeat(np.arange(len(self)), sizes)
        complete = []
        kinds = set(owned)
        for m in self.dataset.modalities:
            owner = np.array([m in names for names in owned]) if len(kinds) > 1 else np.full(len(self), m in owned[0])
            if bool(self.present[m][rows[owner[home]]].all()):
                complete.append(m)
        return Pool(
            {m: torch.from_numpy(x[rows]) for m, x in self.dataset.x.items()},
            {m: torch.from_numpy(p[rows]) for m, p in self.present.items()},
            torch.from_numpy(self.dataset.y[rows]),
            np.cumsum(sizes) - sizes,
            sizes,
            len(self.dataset.classes),
            frozenset(complete),
            owned,
        )

    def summary(self) -> dict[str, Any]:
        """Sizes, class counts [K][C] and owned modalities of each client, as plain lists for a report."""
        counts = {s: class_counts(self.dataset.y, rows, len(self.dataset.classes)) for s, rows in self.indices.items()}
        return {
            "dataset": self.dataset.name,
            "sha256": self.dataset.sha256,
            "clients": len(self),
            "classes": list(self.dataset.classes),
            "modalities": list(self.dataset.modalities),
            "owned": [list(names) for names in self.owned],
            "sizes": {split: table.sum(axis=1).tolist() for split, table in counts.items()},
            "counts": {split: table.tolist() for split, table in counts.items()},
        }


def build_federation(dataset: Dataset, scenario: ScenarioConfig, seed: int) -> Federation:
    """Spread a data set over clients; a pure function of its arguments, the same in every process.

    Training samples follow the partition. Validation and test samples follow the training class counts; under the
    natural partition those with a natural client that trains go to it. A sample without any modality that its
    client owns is left out.

    Args:
        dataset: Pooled data.
        scenario: Clients, partition, modalities.
        seed: The run's seed.

    Raises:
        ConfigError: The scenario cannot be met, or a client would be left without training samples.
    """
    rows = {name: np.flatnonzero(dataset.split == code) for name, code in SPLITS.items()}
    train = rows["train"]
    clients = scenario.clients
    groups = dataset.natural[train] if dataset.natural is not None else None
    placed = partition(dataset.y[train], groups, clients, scenario.partition, numpy_rng(seed, "partition"))
    indices: dict[str, Indices] = {"train": [train[local] for local in placed]}
    counts = class_counts(dataset.y, indices["train"], len(dataset.classes))
    home = natural_homes(dataset, indices["train"]) if scenario.partition.name == "natural" else {}
    for name in ("val", "test"):
        indices[name] = _place_heldout(dataset, rows[name], home, counts, numpy_rng(seed, f"heldout-{name}"))

    modalities, setting = dataset.modalities, scenario.modalities
    owned = tuple(owners(clients, modalities, setting.multimodal, numpy_rng(seed, "owners")))
    splits = ("train",) if setting.heldout == "complete" else tuple(SPLITS)
    usable = np.stack([dataset.present[m] for m in modalities], axis=1)
    if setting.missing > 0:
        usable = _lose_modalities(usable, splits, indices, owned, setting.missing, seed)
    present = {m: np.ascontiguousarray(usable[:, j]) for j, m in enumerate(modalities)}
    for name in splits:
        indices[name] = [_with_something(r, names, present) for r, names in zip(indices[name], owned, strict=True)]
    empty = [k for k, r in enumerate(indices["train"]) if len(r) == 0]
    if empty:
        raise ConfigError(
            f"client {empty[0]} would have no training samples with a modality that it owns ({len(empty)} in all)",
            where="scenario",
            remedy="use fewer clients or raise scenario.modalities.multimodal",
        )
    return Federation(dataset, indices, owned, present, setting.heldout)


def natural_homes(dataset: Dataset, train: Indices) -> dict[int, int]:
    """Natural client -> the client that trains on its samples."""
    assert dataset.natural is not None
    return {int(group): k for k, rows in enumerate(train) for group in np.unique(dataset.natural[rows]) if group >= 0}


def _place_heldout(
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    home: dict[int, int],
    counts: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> Indices:
    clients = len(counts)
    known = np.full(len(rows), -1, dtype=np.int64)
    if home and dataset.natural is not None:
        table = np.full(int(dataset.natural.max()) + 2, -1, dtype=np.int64)  # the last entry serves natural = -1
        table[list(home)] = list(home.values())
        known = table[dataset.natural[rows]]
    strangers = rows[known < 0]
    placed = heldout(dataset.y[strangers], counts, rng)
    at_home = np.argsort(known, kind="stable")
    edges = np.searchsorted(known[at_home], np.arange(clients + 1))
    return [
        np.sort(np.concatenate([rows[at_home[edges[k] : edges[k + 1]]], strangers[placed[k]]])) for k in range(clients)
    ]


def _lose_modalities(
    usable: npt.NDArray[np.bool_],
    splits: Iterable[str],
    indices: dict[str, Indices],
    owned: tuple[tuple[str, ...], ...],
    probability: float,
    seed: int,
) -> npt.NDArray[np.bool_]:
    """Per-sample missing modalities of multimodal clients; one-modality clients keep what they have."""
    rng = numpy_rng(seed, "missing")
    lost = drop_modalities(usable, probability, rng)
    multimodal = [k for k, names in enumerate(owned) if len(names) > 1]
    affected = [indices[split][k] for split in splits for k in multimodal]
    out = usable.copy()
    if affected:
        rows = np.concatenate(affected)
        out[rows] = lost[rows]
    return out


def _with_something(
    rows: npt.NDArray[np.int64], names: tuple[str, ...], present: dict[str, npt.NDArray[np.bool_]]
) -> npt.NDArray[np.int64]:
    return rows[np.any([present[m][rows] for m in names], axis=0)]
