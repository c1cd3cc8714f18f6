"""What a `Dataset` must fulfil, checked by arrays alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedmm.types import SPLITS, Dataset


def problems(dataset: Dataset) -> list[str]:
    """Everything that breaks the contract of `Dataset`, one sentence each; empty when it is sound."""
    n = len(dataset.y)
    found = [*_labels(dataset, n), *_modalities(dataset, n), *_natural(dataset, n)]
    if not any("split" in line or "unit" in line for line in found):
        found += _split(dataset)
    return found


def _labels(dataset: Dataset, n: int) -> Iterator[str]:
    if not dataset.name:
        yield "name is empty"
    for name, array, dtype in (
        ("y", dataset.y, np.int64),
        ("split", dataset.split, np.int8),
        ("unit", dataset.unit, np.int64),
    ):
        if array.dtype != dtype:
            yield f"{name} is {array.dtype}, not {np.dtype(dtype)}"
        if array.shape != (n,):
            yield f"{name} has shape {array.shape}, not ({n},)"
    if len(dataset.classes) < 2 or len(set(dataset.classes)) != len(dataset.classes):
        yield "classes must be two or more different names"
    if n == 0:
        yield "there is no sample"
    elif dataset.y.min() < 0 or dataset.y.max() >= len(dataset.classes):
        yield f"labels must lie in 0..{len(dataset.classes) - 1}, found {dataset.y.min()}..{dataset.y.max()}"


def _modalities(dataset: Dataset, n: int) -> Iterator[str]:
    if not dataset.specs:
        yield "there is no modality"
    if set(dataset.x) != set(dataset.specs) or set(dataset.present) != set(dataset.specs):
        yield "specs, x and present must have the same modalities"
        return
    for name, spec in dataset.specs.items():
        x, present = dataset.x[name], dataset.present[name]
        if "." in name or not name:
            yield f"modality {name!r} needs a name without a dot, as it is part of parameter names"
        if x.dtype != np.float32:
            yield f"x[{name}] is {x.dtype}, not float32"
        if x.shape != (n, *spec.shape):
            yield f"x[{name}] has shape {x.shape}, not {(n, *spec.shape)}"
        if present.dtype != np.bool_ or present.shape != (n,):
            yield f"present[{name}] must be bool ({n},)"
        elif len(x) == n and not np.isfinite(x if present.all() else x[present]).all():
            yield f"x[{name}] holds values that are not finite in samples that have the modality"
    if dataset.specs and n and not np.any([dataset.present[m] for m in dataset.specs], axis=0).all():
        yield "a sample has no modality at all"


def _natural(dataset: Dataset, n: int) -> Iterator[str]:
    natural = dataset.natural
    if natural is None:
        return
    if natural.dtype != np.int64 or natural.shape != (n,):
        yield f"natural must be int64 ({n},)"
    elif n and (natural.min() < -1 or natural.max() >= len(dataset.natural_names)):
        yield f"natural must lie in -1..{len(dataset.natural_names) - 1} (one name for each natural client)"


def _split(dataset: Dataset) -> Iterator[str]:
    if not np.isin(dataset.split, list(SPLITS.values())).all():
        yield f"split must be one of {sorted(SPLITS.values())}"
        return
    units = {name: np.unique(dataset.unit[dataset.split == code]) for name, code in SPLITS.items()}
    for name, members in units.items():
        if not len(members):
            yield f"the split {name} is empty"
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if len(shared := np.intersect1d(units[first], units[second])):
            yield f"{len(shared)} units are in {first} and in {second}, e.g. unit {shared[0]}"
