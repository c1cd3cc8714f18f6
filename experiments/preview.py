"""Tables for `fedmm data preview`."""

from __future__ import annotations

import numpy as np
from rich.table import Column, Table

from fedmm.types import SPLITS, Dataset


def tables(data: Dataset) -> list[Table]:
    """Describe a data set's modalities, its samples by class and split, its units and natural clients."""
    modalities = Table("modality", "kind", "shape", "present", title=data.name, title_justify="left", box=None)
    for name, spec in data.specs.items():
        shape = " x ".join(map(str, spec.shape))
        modalities.add_row(name, spec.kind, shape, f"{data.present[name].mean():.1%}")
    splits = Table("class", *SPLITS, title="samples", title_justify="left", box=None)
    counts = {
        split: np.bincount(data.y[data.split == index], minlength=len(data.classes)) for split, index in SPLITS.items()
    }
    for label, name in enumerate(data.classes):
        splits.add_row(name, *(str(counts[split][label]) for split in SPLITS))
    splits.add_row("all", *(str(counts[split].sum()) for split in SPLITS), style="bold")
    facts = Table("fact", Column("value", overflow="fold"), box=None)
    facts.add_row("units", str(len(np.unique(data.unit))))
    facts.add_row("natural clients", str(len(data.natural_names)))
    facts.add_row("sha256", data.sha256)
    return [modalities, splits, facts]
