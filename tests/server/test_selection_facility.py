"""Facility location: lazy picks are the naive ones, the sum is monotone and submodular, distances are distances."""

import itertools
import math

import numpy as np
import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.directions import distances
from server.selection.facility import Computed, Cover, Stored, greedy, total


def symmetric(rng, clients, levels):
    """A random symmetric matrix; few levels make many ties, None makes none."""
    values = rng.uniform(size=(clients, clients)) if levels is None else rng.integers(0, levels, (clients, clients)) / 3
    upper = np.triu(values, 1)
    return upper + upper.T


def naive(D, pool, count):
    """Greedy by comparing everybody in exact sums, the first in order on a tie."""
    left, nearest, picked = list(pool), [math.inf] * len(D), []
    for _ in range(min(count, len(left))):
        picked.append(selection.argmin(left, nearest, D))
        nearest = [min(n, D[k][picked[-1]]) for k, n in enumerate(nearest)]
        left.remove(picked[-1])
    return picked


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    clients=st.integers(1, 40),
    count=st.integers(1, 40),
    levels=st.sampled_from([None, 1, 2, 3, 10]),
    single=st.booleans(),
)
def test_lazy_greedy_is_naive_greedy(seed, clients, count, levels, single):
    rng = np.random.default_rng(seed)
    D = symmetric(rng, clients, levels).astype(np.float32 if single else np.float64)
    pool = rng.permutation(clients)[: max(1, clients - seed % 5)]
    before = D.copy()
    assert greedy(Cover(D), pool, count) == naive(D.astype(np.float64).tolist(), pool.tolist(), count)
    assert np.array_equal(D, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), clients=st.integers(2, 12), copies=st.integers(2, 4))
def test_clients_with_equal_vectors_tie_whatever_the_rounding(seed, clients, copies):
    v = np.random.default_rng(seed).normal(size=(clients, 3))
    D = distances(torch.tensor(np.tile(v, (copies, 1))))
    picked = greedy(Cover(D), range(clients * copies), clients + 2)
    # Each vector once, by its first bearer; then nobody makes a difference and order decides.
    assert sorted(picked[:clients]) == list(range(clients))
    assert picked[clients:] == [clients, clients + 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), clients=st.integers(2, 30), count=st.integers(1, 12), levels=st.sampled_from([None, 3])
)
def test_random_subsets_are_compared_lazily_too(seed, clients, count, levels):
    D = symmetric(np.random.default_rng(seed), clients, levels)
    picked = greedy(Cover(D), range(clients), count, 4, np.random.default_rng(seed))
    expected = selection.divfl(range(clients), count, clients, D.tolist(), np.random.default_rng(seed), size=4)
    assert picked == expected


def test_lazy_greedy_looks_at_few():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 4))
    D = distances(torch.tensor(centres[rng.integers(0, 20, 400)] + 0.2 * rng.normal(size=(400, 4))))
    cover = Cover(D)
    greedy(cover, range(400), 40)
    assert cover.evaluated < 400 * 40 / 4


def test_a_site_that_is_not_picked_is_not_computed_again():
    D = symmetric(np.random.default_rng(0), 50, None)
    cover = Cover(D)
    first = cover.best(range(50))
    evaluated = cover.evaluated
    assert cover.best(range(50)) == first
    assert cover.evaluated == evaluated == 50


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), clients=st.integers(3, 10))
def test_the_gain_of_a_site_shrinks_as_others_are_added(seed, clients):
    rng = np.random.default_rng(seed)
    D = symmetric(rng, clients, None)
    order = rng.permutation(clients).tolist()
    site, others = order[0], order[1:]
    gains = []
    for size in range(1, len(others) + 1):
        less, more = total(Stored(D), others[:size]), total(Stored(D), [*others[:size], site])
        assert more <= less + 1e-12
        gains.append(less - more)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(gains))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), clients=st.integers(3, 9), count=st.integers(2, 4))
def test_greedy_is_within_its_guarantee(seed, clients, count):
    """After the first pick: what it gains is at least 1 - 1/e of what the best completion gains."""
    D = symmetric(np.random.default_rng(seed), clients, None)
    count = min(count, clients)
    picked = greedy(Cover(D), range(clients), count)
    alone = total(Stored(D), picked[:1])
    best = min(total(Stored(D), [picked[0], *rest]) for rest in itertools.combinations(range(clients), count - 1))
    assert alone - total(Stored(D), picked) >= (1 - 1 / math.e) * (alone - best) - 1e-12


def test_computed_distances_are_euclidean():
    rng = np.random.default_rng(3)
    sites, demand = rng.normal(5, 1, size=(7, 20)), rng.normal(5, 1, size=(30, 20))
    source = Computed(sites, demand)
    assert source.shape == (7, 30)
    expected = np.linalg.norm(sites[[4, 1], None] - demand, axis=2)
    assert source.rows(np.array([4, 1])) == pytest.approx(expected, rel=1e-5)


def test_picks_do_not_depend_on_where_distances_come_from():
    v = np.random.default_rng(5).normal(size=(300, 8))
    assert greedy(Cover(Computed(v, v)), range(300), 30) == greedy(Cover(distances(torch.tensor(v))), range(300), 30)


def test_an_empty_pool_and_a_short_one():
    D = symmetric(np.random.default_rng(0), 4, None)
    assert greedy(Cover(D), [], 3) == []
    assert sorted(greedy(Cover(D), [1, 3], 3)) == [1, 3]
