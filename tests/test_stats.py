from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from fedmm.stats import holm, mean_interval, paired_interval, sign_flip_p

# Multiples of 1/1000, so that a spread is either exactly zero or far above rounding errors.
numbers = st.integers(-1000, 1000).map(lambda i: i / 1000)
samples = st.lists(numbers, min_size=2, max_size=12)
pairs = st.integers(2, 8).flatmap(lambda n: st.tuples(*(st.lists(numbers, min_size=n, max_size=n) for _ in range(2))))


def spread(values) -> bool:
    return len(set(np.round(values, 9))) > 1


@given(samples.filter(spread), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_mean_interval_is_scipys(values, level):
    got = mean_interval(values, level)
    expected = reference.t.interval(level, len(values) - 1, np.mean(values), reference.sem(values))
    assert (got.low, got.high) == pytest.approx(expected, abs=1e-9)
    assert got.half == pytest.approx(got.high - got.mean, abs=1e-9)
    assert got.n == len(values)


@given(pairs.filter(lambda ab: spread(np.subtract(*ab))))
def test_paired_interval_is_scipys_paired_t_test(ab):
    a, b = ab
    got = paired_interval(a, b, 0.95)
    expected = reference.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert got.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert (got.low, got.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert (got.low > 0 or got.high < 0) == (got.p < 0.05) or got.p == pytest.approx(0.05, abs=1e-6)


@given(pairs)
@settings(max_examples=40, deadline=None)
def test_sign_flip_is_scipys_exact_permutation_test(ab):
    a, b = np.asarray(ab[0]), np.asarray(ab[1])
    expected = reference.permutation_test(
        (a, b), lambda x, y, axis: np.round(np.mean(x - y, axis=axis), 12), permutation_type="samples",
        n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    assert sign_flip_p(a - b) == pytest.approx(expected.pvalue, abs=1e-12)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=10))
def test_holm_follows_its_definition(pvalues):
    got = holm(pvalues)
    known = sorted(p for p in pvalues if not math.isnan(p))
    m = len(known)
    for p, adjusted in zip(pvalues, got, strict=True):
        if math.isnan(p):
            assert math.isnan(adjusted)
        else:
            last = max(i for i, q in enumerate(known) if q == p)
            expected = max(min(1.0, (m - j) * known[j]) for j in range(last + 1))
            first = max(min(1.0, (m - j) * known[j]) for j in range(known.index(p) + 1))
            assert first <= adjusted <= expected
            assert adjusted >= p


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_interval_by_hand():
    got = mean_interval([1.0, 2.0, 3.0])
    assert got.mean == 2
    assert got.half == pytest.approx(4.302652729911275 / math.sqrt(3))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_values_have_no_bounds(n):
    one, two = mean_interval([0.5] * n), paired_interval([0.5] * n, [0.2] * n)
    assert all(math.isnan(v) for v in (one.low, one.high, two.low, two.high, two.p))
    assert math.isnan(one.mean) == (n == 0)
    assert two.n == n


def test_no_spread():
    assert paired_interval([0.3, 0.4], [0.1, 0.2]).p == 0
    assert paired_interval([0.3, 0.4], [0.3, 0.4]).p == 1
    assert mean_interval([0.1] * 3).half == pytest.approx(0, abs=1e-15)


def test_smallest_sign_flip_p():
    assert sign_flip_p([1.0] * 6) == 2 / 64
    assert sign_flip_p([0.0, 0.0]) == 1
    assert math.isnan(sign_flip_p([]))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_interval([1.0], 1.0),
        lambda: mean_interval([math.nan]),
        lambda: paired_interval([1.0, 2.0], [1.0]),
        lambda: holm([1.5]),
        lambda: sign_flip_p([1.0] * 21),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()
