import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.data.missing import drop_modalities, owners


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 100), st.integers(0, 2**31))
def test_floor_rk_clients_own_all_and_the_rest_one_each_evenly(clients, count, percent, seed):
    names = [f"m{j}" for j in range(count)]
    owned = owners(clients, names, percent / 100, np.random.default_rng(seed))
    single = [o for o in owned if o != tuple(names)] if count > 1 else []
    if count > 1:
        assert clients - len(single) == clients * percent // 100
        shares = [single.count((name,)) for name in names]
        assert sum(shares) == len(single)
        assert max(shares) - min(shares) <= 1
    else:
        assert owned == [("m0",)] * clients


def test_binary_rounding_does_not_lose_a_client():
    owned = owners(100, ["a", "b"], 0.29, np.random.default_rng(0))
    assert sum(len(o) == 2 for o in owned) == 29


def test_the_seed_decides_who():
    first, again, other = (owners(20, ["a", "b"], 0.5, np.random.default_rng(s)) for s in (0, 0, 1))
    assert first == again
    assert first != other


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.integers(1, 4), st.floats(0, 0.99), st.integers(0, 2**31))
def test_no_sample_loses_everything_and_none_gains(n, count, probability, seed):
    rng = np.random.default_rng(seed)
    present = rng.random((n, count)) < 0.7
    kept = drop_modalities(present, probability, rng)
    assert not (kept & ~present).any()
    assert np.array_equal(kept.any(axis=1), present.any(axis=1))


def test_rate_and_fairness():
    kept = drop_modalities(np.ones((40_000, 2), dtype=bool), 0.3, np.random.default_rng(0))
    # Lost: 0.3 less half of the 0.09 that would lose both.
    assert (~kept).mean(axis=0) == pytest.approx([0.255, 0.255], abs=0.01)
