import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedmm.config.schema import PartitionConfig
from fedmm.data import partition as P
from fedmm.errors import ConfigError

seeds = st.integers(0, 2**31)
labels = st.builds(
    lambda n, c, s: np.random.default_rng(s).integers(0, c, n), st.integers(30, 300), st.integers(2, 12), seeds
)


def once(indices, n):
    return np.array_equal(np.sort(np.concatenate(indices)), np.arange(n)) and all(
        (np.diff(r) > 0).all() for r in indices
    )


@settings(max_examples=80, deadline=None)
@given(labels, st.integers(1, 15), st.sampled_from(["iid", "dirichlet", "quantity"]), st.floats(0.01, 50), seeds)
def test_every_sample_once_and_nobody_short(y, clients, name, alpha, seed):
    cfg = PartitionConfig(name=name, alpha=alpha, sigma=2.0, min_samples=2)
    indices = P.partition(y, None, clients, cfg, np.random.default_rng(seed))
    assert len(indices) == clients
    assert once(indices, len(y))
    assert min(map(len, indices)) >= 2
    again = P.partition(y, None, clients, cfg, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(indices, again, strict=True))


@settings(max_examples=60, deadline=None)
@given(labels, st.integers(2, 15), st.floats(0.01, 10), st.floats(0.5, 2.0), seeds)
def test_a_client_above_the_cap_takes_no_later_class(y, clients, alpha, cap, seed):
    indices = P.dirichlet(y, clients, np.random.default_rng(seed), alpha, cap, min_samples=0)
    counts = P.class_counts(y, indices, int(y.max()) + 1)
    before = np.cumsum(counts, axis=1) - counts
    capped = before > cap * len(y) / clients
    # Where every client is capped, the class must go somewhere.
    open_classes = ~capped.all(axis=0)
    assert not (capped & (counts > 0))[:, open_classes].any()


def test_alpha_controls_the_skew():
    y = np.repeat(np.arange(10), 300)

    def skew(alpha):
        counts = P.class_counts(y, P.dirichlet(y, 10, np.random.default_rng(1), alpha), 10)
        return (counts / counts.sum(axis=1, keepdims=True)).max(axis=1).mean()

    assert skew(0.1) > 0.35 > 0.2 > skew(1000.0)


def test_sigma_controls_the_sizes():
    y = np.zeros(5000, dtype=np.int64)
    even, odd = (
        [len(r) for r in P.quantity(y, 20, np.random.default_rng(0), sigma, min_samples=5)] for sigma in (0, 1.5)
    )
    assert max(even) - min(even) <= 1
    assert max(odd) > 5 * min(odd)


@settings(max_examples=60, deadline=None)
@given(labels, st.integers(1, 12), st.integers(1, 6), seeds)
def test_pathological_clients_hold_k_classes(y, clients, k, seed):
    classes = len(np.unique(y))
    assume(k <= classes <= clients * k)
    indices = P.pathological(y, clients, np.random.default_rng(seed), k, min_samples=0)
    assert once(indices, len(y))
    assert max(len(np.unique(y[r])) for r in indices) <= k
    counts = P.class_counts(y, indices, int(y.max()) + 1)
    for column in counts.T:
        held = column[column > 0]
        assert not len(held) or held.max() - held.min() <= 1


@pytest.mark.parametrize(
    ("clients", "cfg", "words"),
    [
        (3, {"name": "pathological", "classes_per_client": 2}, "cannot hold all 10 classes"),
        (20, {"name": "pathological", "classes_per_client": 11}, "the training data have 10"),
        (60, {"name": "iid", "min_samples": 2}, "use at most 50 clients"),
        (9, {"name": "natural"}, "have 8 natural clients"),
    ],
)
def test_what_cannot_be_met_is_refused(clients, cfg, words):
    y = np.arange(100) % 10
    with pytest.raises(ConfigError, match=words):
        P.partition(y, np.arange(100) % 8, clients, PartitionConfig(**cfg), np.random.default_rng(0))


def test_natural_needs_natural_clients():
    with pytest.raises(ConfigError, match="no natural clients"):
        P.partition(np.arange(10), None, 2, PartitionConfig(name="natural"), np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 9), min_size=5, max_size=80), st.integers(1, 10))
def test_natural_groups_stay_whole_and_merge_in_turn(groups, clients):
    groups = np.array(groups)
    known = np.unique(groups[groups >= 0])
    assume(len(known) >= clients)
    indices = P.natural(groups, clients)
    assert once(indices, len(groups))
    for rank, group in enumerate(known):
        assert set(np.flatnonzero(groups == group)) <= set(indices[rank % clients])


@settings(max_examples=60, deadline=None)
@given(labels, st.integers(1, 30), seeds)
def test_heldout_follows_the_training_counts(y, clients, seed):
    rng = np.random.default_rng(seed)
    train = rng.integers(0, 4, (clients, int(y.max()) + 1))
    indices = P.heldout(y, train, rng)
    assert once(indices, len(y))
    counts = P.class_counts(y, indices, train.shape[1])
    for c in range(train.shape[1]):
        weights = train[:, c] if train[:, c].any() else np.ones(clients)
        assert np.abs(counts[:, c] - weights * counts[:, c].sum() / weights.sum()).max() < 1 + 1e-6


def test_ten_thousand_clients_are_quick():
    y = np.arange(60_000) % 10
    start = time.process_time()  # others may use the machine
    for name in ("iid", "dirichlet", "quantity", "pathological"):
        cfg = PartitionConfig(name=name, alpha=0.1)
        assert once(P.partition(y, None, 10_000, cfg, np.random.default_rng(0)), len(y))
    assert time.process_time() - start < 4


def test_the_table_covers_the_schema():
    assert set(P.PARTITIONS) == set(PartitionConfig.model_fields["name"].annotation.__args__)
    assert all(entry.description for entry in P.PARTITIONS.values())
