"""The order of a round's clients follows from the picks and their sizes, and cuts the work evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.places import arrange
from server.selection import Pick

BOTH, ONE = ("a", "b"), ("a",)


def picks(count, modalities=BOTH):
    return [Pick(k, modalities) for k in range(count)]


def stacks(places, cohort):
    found = {}
    for client, place in places.items():
        found.setdefault(place // cohort, []).append((place, client))
    return [[client for _, client in sorted(found[s])] for s in sorted(found)]


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=1, max_size=70),
    st.sampled_from([1, 2, 4, 16]),
    st.randoms(),
)
def test_every_client_has_a_place_whatever_the_order_of_picks(clients, cohort, random):
    samples = [n for n, _ in clients]
    chosen = [Pick(k, BOTH if both else ONE) for k, (_, both) in enumerate(clients)]
    places = arrange(chosen, samples, cohort)
    assert sorted(places) == list(range(len(clients)))
    assert len(set(places.values())) == len(clients)
    for stack in stacks(places, cohort):
        assert len(stack) <= cohort
        here = sorted(places[k] % cohort for k in stack)
        assert here == list(range(len(stack)))  # no gap inside a stack
    random.shuffle(chosen)
    assert arrange(chosen, samples, cohort) == places


def test_those_who_train_alike_come_together_and_the_largest_first():
    samples = [5, 50, 20, 40, 10, 30]
    chosen = [Pick(k, ONE if k % 2 else BOTH) for k in range(6)]
    places = arrange(chosen, samples, 8)
    order = sorted(places, key=places.get)
    assert [chosen[k].modalities for k in order] == [ONE] * 3 + [BOTH] * 3
    assert [samples[k] for k in order] == [50, 40, 30, 20, 10, 5]


@pytest.mark.parametrize(("count", "cohort"), [(8, 16), (20, 16), (30, 32)])
def test_stacks_take_about_equally_long(count, cohort):
    samples = np.random.default_rng(0).lognormal(4, 0.7, count).astype(int) + 1
    made = stacks(arrange(picks(count), samples, cohort), cohort)
    assert len(made) % 2 == 0
    cost = [4 * samples[s].max() + samples[s].sum() for s in made]
    largest_alone = 5 * samples.max()
    even = (sum(samples) + 4 * sum(samples[s].max() for s in made)) / len(made)
    assert max(cost) <= max(1.3 * even, largest_alone)


@pytest.mark.parametrize("cohort", [1, 16])
def test_halves_of_the_places_are_halves_of_the_work(cohort):
    samples = np.random.default_rng(1).lognormal(4, 0.5, 128).astype(int) + 1
    places = arrange(picks(128), samples, cohort)
    for parts in (2, 4):
        work = np.zeros(parts)
        for client, place in places.items():
            work[place * parts // (1 << max(places.values()).bit_length())] += samples[client]
        assert work.max() < 1.15 * work.mean()
