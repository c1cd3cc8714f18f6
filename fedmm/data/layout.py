"""A federation's samples as files that many processes map into memory: one copy on a machine, whoever trains.

lay_out writes, and `open_layout` maps, one array file for each split and field, and a JSON file with the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedmm.data.federation import Federation, Pool
from fedmm.types import SPLITS, ModalitySpec

_FACTS = "federation.json"


@dataclass(frozen=True)
class Layout:
    """What clients of one federation need: their samples by split, and the shape of the task.

    Attributes:
        specs: Modality -> spec, in slot order.
        classes: Number of classes C.
        pools: Split -> samples of all clients.
    """

    specs: dict[str, ModalitySpec]
    classes: int
    pools: Mapping[str, Pool]


def layout(federation: Federation) -> Layout:
    """A federation's samples in this process's memory."""
    return Layout(federation.dataset.specs, len(federation.dataset.classes), _Pools(federation))


class _Pools(dict[str, Pool]):
    """Pools that are gathered when they are first asked for."""

    def __init__(self, federation: Federation) -> None:
        super().__init__()
        self._federation = federation

    def __missing__(self, split: str) -> Pool:
        return self._federation.pool(split)


def lay_out(federation: Federation, folder: Path) -> str:
    """Write a federation's samples to `folder`, which other processes may then open; returns its path."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "specs": {m: asdict(spec) for m, spec in federation.dataset.specs.items()},
        "classes": len(federation.dataset.classes),
        "pools": {},
    }
    for split in SPLITS:
        pool = federation.gather(split)
        for m in pool.x:
            np.save(folder / f"{split}.x.{m}.npy", pool.x[m].numpy())
            np.save(folder / f"{split}.present.{m}.npy", pool.present[m].numpy())
        for name, array in (("y", pool.y.numpy()), ("starts", pool.starts), ("sizes", pool.sizes)):
            np.save(folder / f"{split}.{name}.npy", array)
        kinds = sorted(set(pool.owned))
        facts["pools"][split] = {
            "complete": sorted(pool.complete),
            "kinds": kinds,
            "owned": [kinds.index(names) for names in pool.owned],
        }
    (folder / _FACTS).write_text(json.dumps(facts))
    return str(folder)


def open_layout(folder: str) -> Layout:
    """Map what `lay_out` wrote."""
    home = Path(folder)
    facts = json.loads((home / _FACTS).read_text())
    specs = {m: ModalitySpec(raw["kind"], tuple(raw["shape"])) for m, raw in facts["specs"].items()}

    def tensor(name: str) -> torch.Tensor:
        # Copy on write: pages are shared with all other processes, as nobody writes.
        return torch.from_numpy(np.load(home / f"{name}.npy", mmap_mode="c"))

    pools = {}
    for split, raw in facts["pools"].items():
        kinds = [tuple(names) for names in raw["kinds"]]
        pools[split] = Pool(
            {m: tensor(f"{split}.x.{m}") for m in specs},
            {m: tensor(f"{split}.present.{m}") for m in specs},
            tensor(f"{split}.y"),
            np.load(home / f"{split}.starts.npy"),
            np.load(home / f"{split}.sizes.npy"),
            facts["classes"],
            frozenset(raw["complete"]),
            tuple(kinds[i] for i in raw["owned"]),
        )
    return Layout(specs, facts["classes"], pools)
