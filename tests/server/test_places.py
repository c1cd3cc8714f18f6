"""The order of a round's clients follows from the picks and their work, and cuts the work evenly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.places import Size, arrange
from server.selection import Pick

BOTH, ONE = ("a", "b"), ("a",)
MLP = {BOTH: Size(50_000, 50_000, 12), ONE: Size(30_000, 30_000, 12)}


def picks(count, modalities=BOTH):
    return [Pick(k, modalities) for k in range(count)]


def placed(chosen, samples, cohort, *, epochs=2, batch=32, sizes=MLP, **options):
    n = np.array([samples[p.client] for p in chosen], dtype=np.int64)
    return arrange(chosen, epochs * -(-n // batch), epochs * n, sizes, cohort, **options)


def stacks(places, cohort):
    found = {}
    for client, place in places.items():
        found.setdefault(place // cohort, []).append((place, client))
    return {s: [client for _, client in sorted(found[s])] for s in sorted(found)}


def seconds(samples, size, epochs=2, batch=32):
    """What a stack was measured to take on a CPU: 0.6 ms a step, and for each client its update, samples and sums.

    1.6 ms a stack are left out: halves have as many stacks.
    """
    n = np.array(samples)
    steps = epochs * -(-n // batch)
    own = size.parameters * (100 * steps + 45) + size.multiplications * epochs * n
    return 6e-4 * steps.max() + 2.2e-11 * own.sum()


def halves(places, samples, cohort, size):
    middle = 1 << (max(places.values()).bit_length() - 1)
    work = [0.0, 0.0]
    for stack, clients in stacks(places, cohort).items():
        work[stack * cohort >= middle] += seconds([samples[k] for k in clients], size)
    return work


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=1, max_size=70),
    st.sampled_from([1, 2, 4, 16]),
    st.randoms(),
)
def test_every_client_has_a_place_whatever_the_order_of_picks(clients, cohort, random):
    samples = [n for n, _ in clients]
    chosen = [Pick(k, BOTH if both else ONE) for k, (_, both) in enumerate(clients)]
    places = placed(chosen, samples, cohort)
    assert sorted(places) == list(range(len(clients)))
    assert len(set(places.values())) == len(clients)
    for stack in stacks(places, cohort).values():
        assert len(stack) <= cohort
        assert [places[k] % cohort for k in stack] == list(range(len(stack)))  # no gap inside a stack
        assert len({chosen[k].modalities for k in stack}) == 1
        assert [samples[k] for k in stack] == sorted((samples[k] for k in stack), reverse=True)
    random.shuffle(chosen)
    assert placed(chosen, samples, cohort) == places


def test_nobody_has_no_place():
    assert placed([], [5, 6], 8) == {}


def test_those_with_more_steps_come_first_whatever_their_samples():
    # Client 1 makes twice the passes of client 0 over fewer samples.
    places = arrange(picks(2), np.array([4, 6]), np.array([100, 90]), MLP, 2)
    assert places == {1: 0, 0: 1}


@pytest.mark.parametrize("size", [Size(50_000, 50_000, 12), Size(120_000, 750_000, 12), Size(2_000_000, 2_000_000, 12)])
@pytest.mark.parametrize(
    ("count", "cohort", "mean"),
    [
        (20, 32, 33),
        (20, 32, 172),
        (33, 32, 33),
        (60, 32, 33),
        (100, 32, 33),
        (20, 1, 46),
        (300, 32, 33),
        (1000, 32, 33),
    ],
)
def test_halves_take_equally_long(count, cohort, mean, size):
    rng, longer = np.random.default_rng(0), []
    for _ in range(20):
        samples = 1 + (mean * rng.lognormal(-0.125, 0.5, count)).astype(int)
        work = halves(placed(picks(count), samples, cohort, sizes={BOTH: size}), samples, cohort, size)
        longer.append(max(work) / np.mean(work))
    assert np.mean(longer) < 1.06


def test_one_device_gets_as_few_stacks_as_there_can_be():
    chosen = [Pick(k, ONE if k < 5 else BOTH) for k in range(40)]
    made = stacks(placed(chosen, [30] * 40, 32, halved=False), 32)
    assert sorted(map(len, made.values()))[0] == 5
    assert len(made) == 3


def test_one_giant_gets_a_half_of_its_own():
    samples = [4000] + [30] * 19
    places = placed(picks(20), samples, 32)
    assert [len(s) for s in stacks(places, 32).values()].count(1) == 1
    assert min(halves(places, samples, 32, MLP[BOTH])) < seconds([4000], MLP[BOTH])


def test_large_models_count_for_more():
    # As many clients with the same samples; those of one kind train ten times the parameters.
    chosen = [Pick(k, BOTH if k < 10 else ONE) for k in range(20)]
    places = placed(chosen, [30] * 20, 1, sizes={BOTH: Size(10**6, 10**6, 12), ONE: Size(10**5, 10**5, 12)})
    first = [places[k] < 16 for k in range(10)]
    assert sum(first) == 5


def test_samples_count_by_their_multiplications():
    # As many parameters and steps: a client of the first kind convolves over large images.
    chosen = [Pick(k, BOTH if k < 10 else ONE) for k in range(20)]
    places = placed(chosen, [30] * 20, 1, sizes={BOTH: Size(10**5, 10**7, 12), ONE: Size(10**5, 10**5, 12)})
    assert sum(places[k] < 16 for k in range(10)) == 5


@pytest.mark.parametrize("cohort", [1, 16])
def test_halves_and_quarters_of_the_places_are_that_much_of_the_work(cohort):
    samples = np.random.default_rng(1).lognormal(4, 0.5, 128).astype(int) + 1
    places = placed(picks(128), samples, cohort, sizes={BOTH: Size(2_000_000, 2_000_000, 12)})
    for parts in (2, 4):
        work = np.zeros(parts)
        for client, place in places.items():
            steps = 2 * -(-samples[client] // 32)
            work[place * parts // (1 << max(places.values()).bit_length())] += 100 * steps + 2 * samples[client]
        assert work.max() < 1.15 * work.mean()
