"""Medians, spreads and ratios of repeated measurements, and how far two models lie apart: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import median

import torch

from fedmm.types import Tensors


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements with the smallest and the largest."""

    median: float
    low: float
    high: float
    n: int

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """Median and range, as in 0.35 (0.32-0.42), with so many significant digits; one value alone without range."""
        values = [number(v * scale, digits) for v in (self.median, self.low, self.high)]
        return values[0] if self.n == 1 else f"{values[0]} ({values[1]}-{values[2]})"


def spread(values: Sequence[float]) -> Spread:
    """Median, minimum and maximum of at least one value."""
    if not values:
        raise ValueError("nothing was measured")
    return Spread(float(median(values)), float(min(values)), float(max(values)), len(values))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times larger the first is, repeat by repeat: the i-th values were measured next to each other.

    Only repeats that both have count.

    Raises:
        ValueError: There is none.
    """
    return spread([a / b for a, b in zip(slow, fast, strict=False)])


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and without an exponent; 0 below a billionth."""
    return f"{Decimal(f'{value:.{digits}g}'):f}" if abs(value) > 1e-9 else "0"


def distance(a: Tensors, b: Tensors) -> float:
    """Largest relative difference of a tensor, max over tensors of ||a - b|| / ||b||, in float64.

    Raises:
        ValueError: Names or shapes differ.
    """
    if set(a) != set(b) or any(a[n].shape != b[n].shape for n in a):
        raise ValueError(f"the models are not alike: {sorted(set(a) ^ set(b)) or 'shapes differ'}")
    worst = 0.0
    for name, other in b.items():
        x, y = a[name].to(torch.float64), other.to(torch.float64)
        scale = float(y.norm())
        gap = float((x - y).norm())
        # A model that is not finite is not equal to anything.
        relative = gap / scale if scale > 0 else gap
        worst = max(worst, relative) if relative == relative else float("inf")
    return worst
