"""Means, intervals and tests over seeds, as pure functions.

Sources: Student, "The probable error of a mean", Biometrika 6 (1908), for the t interval and the paired t test;
Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979);
Fisher, "The design of experiments" (1935), section 21, for the sign-flip test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

MAX_FLIPS = 20
"""Most differences that `sign_flip_p` enumerates (2^19 distinct sums)."""


@dataclass(frozen=True)
class Interval:
    """A mean over n values with its confidence interval; bounds are nan where n < 2."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Paired:
    """The mean of a - b over n pairs, its interval, and the paired t test's two-sided p-value; nan where n < 2."""

    mean: float
    low: float
    high: float
    n: int
    p: float


def _finite(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        raise ValueError("values must be a flat sequence of finite numbers")
    return array


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64], level: float = 0.95) -> Interval:
    """Mean and Student t interval: mean +- t_{(1 + level)/2, n - 1} s / sqrt(n), s with divisor n - 1.

    Args:
        values: n independent values, one a seed.
        level: Coverage, between 0 and 1.

    Returns:
        The interval; nan bounds for n = 1, all nan for n = 0.

    Raises:
        ValueError: A value is not finite, or `level` is not strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1, not {level}")
    x = _finite(values)
    if x.size == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, x.size - 1)) * _standard_error(x)
    return Interval(mean, mean - half, mean + half, int(x.size))


def paired_interval(
    a: Sequence[float] | npt.NDArray[np.float64], b: Sequence[float] | npt.NDArray[np.float64], level: float = 0.95
) -> Paired:
    """Mean of the differences a - b, its Student t interval, and the paired t test's two-sided p-value.

    Args:
        a: n values; a[i] and b[i] share their seed.
        b: n values.
        level: Coverage, between 0 and 1.

    Returns:
        The difference; bounds and p are nan for n < 2. Without any spread p is 0, or 1 where the mean is 0 too.

    Raises:
        ValueError: Lengths differ, a value is not finite, or `level` is out of range.
    """
    x, y = _finite(a), _finite(b)
    if x.size != y.size:
        raise ValueError(f"paired values need equal lengths, not {x.size} and {y.size}")
    difference = x - y
    interval = mean_interval(difference, level)
    if interval.n < 2:
        return Paired(interval.mean, math.nan, math.nan, interval.n, math.nan)
    error = _standard_error(difference)
    p = float(interval.mean == 0) if error == 0 else 2 * float(stats.t.sf(abs(interval.mean) / error, interval.n - 1))
    return Paired(interval.mean, interval.low, interval.high, interval.n, p)


def _standard_error(x: npt.NDArray[np.float64]) -> float:
    # Equal values give a spread of rounding errors, which a t statistic would blow up to certainty.
    spread = float(x.std(ddof=1))
    return 0.0 if spread <= 1e-12 * float(np.abs(x).max()) else spread / math.sqrt(x.size)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values: p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)), in the order given.

    Args:
        pvalues: p-values of one family; a nan is passed through and does not count in m.

    Returns:
        Adjusted p-values; rejecting where one is at most alpha keeps the family-wise error at alpha.

    Raises:
        ValueError: A p-value lies outside [0, 1].
    """
    p = np.asarray(pvalues, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(p))
    if np.any((p[known] < 0) | (p[known] > 1)):
        raise ValueError("p-values must lie in [0, 1]")
    adjusted = np.full(p.shape, math.nan)
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * p[order]))
    return [float(value) for value in adjusted]


def sign_flip_p(differences: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Exact two-sided sign-flip (paired permutation) test of "the differences are symmetric about 0".

    Enumerates all 2^n sign patterns; p is the share whose |sum| is at least the observed one. It assumes no
    normality, and its smallest value is 2^(1 - n): no n below 6 can reach 0.05.

    Args:
        differences: n paired differences, n <= 20.

    Returns:
        The p-value; nan for n = 0.

    Raises:
        ValueError: n > 20, or a difference is not finite.
    """
    d = _finite(differences)
    if d.size > MAX_FLIPS:
        raise ValueError(f"exact enumeration is limited to {MAX_FLIPS} differences, not {d.size}")
    if d.size == 0:
        return math.nan
    # Flipping every sign leaves |sum| alone, so the first sign can stay fixed.
    sums = d[:1]
    for value in d[1:]:
        sums = np.concatenate([sums + value, sums - value])
    slack = 1e-12 * float(np.abs(d).sum())
    return float(np.mean(np.abs(sums) >= abs(float(d.sum())) - slack))
