"""What the reports of `fedmm.metrics.local` must look like, so that a server can refuse what does not.

Sums merge by adding: one misshapen, missing or negative entry would spoil the figures of all clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch

from fedmm.types import Tensors


class Field(NamedTuple):
    """One tensor of a report: its shape, and whether negative entries make sense."""

    shape: tuple[int, ...]
    signed: bool = False


Fields = dict[str, Field]


@dataclass(frozen=True)
class Sizes:
    """What shapes depend on: number of classes C, feature width d, and whether modalities have own heads."""

    classes: int
    features: int
    own_heads: bool


def _prototypes(modalities: Sequence[str], size: Sizes) -> Fields:
    found: Fields = {}
    for m in modalities:
        found[f"prototype_sum.{m}"] = Field((size.classes, size.features), signed=True)
        found[f"prototype_count.{m}"] = Field((size.classes,))
        found[f"hits.{m}"] = found[f"shown.{m}"] = Field(())
    return found


def _confidence(modalities: Sequence[str], size: Sizes) -> Fields:
    if len(modalities) < 2 or not size.own_heads:
        return {}
    return {f"{name}.{m}": Field(()) for m in modalities for name in ("confidence", "confidence_count")}


def _moments(modalities: Sequence[str], size: Sizes) -> Fields:
    d, c = size.features + 1, size.classes
    grams = {f"gram.{m}": Field((d, d), signed=True) for m in modalities}
    return grams | {f"cross.{m}": Field((d, c), signed=True) for m in modalities}


_STATISTICS: Mapping[str, Callable[[Sequence[str], Sizes], Fields]] = MappingProxyType(
    {"prototypes": _prototypes, "confidence": _confidence, "moments": _moments}
)


def statistics_fields(requests: Iterable[str], modalities: Sequence[str], size: Sizes) -> Fields:
    """Fields of the statistics that were asked of a client that owns `modalities`."""
    return {name: field for r in requests for name, field in _STATISTICS[r](modalities, size).items()}


def evaluation_fields(modalities: Sequence[str], size: Sizes, probes: Tensors) -> Fields:
    """Fields of an evaluation (`fedmm.metrics.local.evaluate`) on data with `modalities`."""
    square = Field((size.classes, size.classes))
    found = {"confusion": square, "loss": Field(()), "count": Field(())}
    for m in modalities:
        found[f"masked.{m}"] = square
        if size.own_heads:
            found[f"head.{m}"] = square
        if f"probe.{m}" in probes:
            found[f"probe.{m}"] = square
        found[f"feature_sum.{m}"] = Field((size.features,), signed=True)
        found[f"feature_square.{m}"] = Field((size.features,))
        found[f"feature_count.{m}"] = Field(())
    return found


def fault(report: Tensors, fields: Fields) -> str | None:
    """Why a report is not what was asked for, or None: names, shapes, finite float64 values, signs."""
    return _fault(report, fields, 0)


def stacked_fault(report: Tensors, fields: Fields) -> str | None:
    """`fault` of the reports of several clients, one row each in every tensor."""
    return _fault(report, fields, 1)


def _fault(report: Tensors, fields: Fields, leading: int) -> str | None:
    if missing := sorted(set(fields) - set(report)):
        return f"the report lacks {missing[0]}"
    if extra := sorted(set(report) - set(fields)):
        return f"the report has {extra[0]}, which was not asked for"
    for name, (shape, signed) in fields.items():
        tensor = report[name]
        if tuple(tensor.shape[leading:]) != shape or tensor.dtype != torch.float64:
            return f"{name} is {tensor.dtype} {list(tensor.shape[leading:])}, not float64 {list(shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has values that are not finite"
        if not signed and bool((tensor < 0).any()):
            return f"{name} has negative values"
    return None
