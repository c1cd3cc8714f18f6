"""Selectors: uniform is uniform, cover covers, power-of-choice chooses power."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedmm.config.schema import Plugin
from fedmm.errors import ConfigError
from fedmm.seeding import numpy_rng
from server.knowledge import Directions, Federates, Imbalance, WholeDirections
from server.selection import Situation, build_selector
from server.selection.base import draw
from server.selection.submodular import CMSFed, Cover, DivFL
from server.selection.uniform import Uniform

CLIENTS, COUNT, ROUNDS = 20, 5, 2000


def federates(samples=None, owned=None, modalities=("a", "b")):
    return Federates(modalities, owned or (modalities,) * CLIENTS, samples or (10,) * CLIENTS)


def situation(facts, candidates=None, losses=None, knowledge=None):
    return Situation(
        1, candidates or tuple(range(CLIENTS)), facts, knowledge or {}, lambda ks: {k: losses[k] for k in ks}
    )


def p_value(counts, expected):
    statistic = ((counts - expected) ** 2 / expected).sum()
    return chi2.sf(statistic, len(counts) - 1)


@pytest.mark.parametrize("name", ["uniform", "divfl", "cmsfed"])
def test_uniform_selection_is_uniform(name):
    """Over 2,000 rounds, for clients and for pairs; submodular selection with one random candidate alike."""
    facts = federates()
    knowledge = {"directions": Directions(facts), "whole_directions": WholeDirections(facts)}
    vectors = torch.randn(CLIENTS, 3, generator=torch.Generator().manual_seed(0))
    for key in ("joint", "encoder.a", "encoder.b"):
        knowledge["directions"].tensors[f"direction.{key}"] = vectors
    knowledge["whole_directions"].tensors["direction.whole"] = vectors
    knowledge["imbalance"] = Imbalance(facts)
    params = {} if name == "uniform" else {"candidates": 1}
    params |= {"theta": float("inf")} if name == "cmsfed" else {}
    selector = build_selector(Plugin(name=name, **params))
    seen, pairs = np.zeros(CLIENTS), np.zeros((CLIENTS, CLIENTS))
    for round in range(ROUNDS):
        picks = selector.select(situation(facts, knowledge=knowledge), COUNT, numpy_rng(7, "selection", round))
        clients = [p.client for p in picks]
        assert len(set(clients)) == COUNT
        seen[clients] += 1
        pairs[np.ix_(clients, clients)] += 1
    # Draws without replacement vary less than a multinomial: rescale so that the statistic is chi-square.
    shrink = (CLIENTS - COUNT) / (CLIENTS - 1)
    expected = ROUNDS * COUNT / CLIENTS
    assert chi2.sf(((seen - expected) ** 2 / expected).sum() / shrink, CLIENTS - 1) > 0.001
    together = pairs[np.triu_indices(CLIENTS, 1)]
    expected = ROUNDS * COUNT * (COUNT - 1) / (CLIENTS * (CLIENTS - 1))
    assert p_value(together, expected) > 0.001


def test_uniform_ignores_samples_and_respects_candidates():
    facts = federates(samples=tuple(range(1, CLIENTS + 1)))
    allowed = (2, 3, 5, 7, 11, 13)
    counts = np.zeros(CLIENTS)
    for round in range(600):
        for pick in build_selector(Plugin(name="uniform")).select(
            situation(facts, allowed), 2, numpy_rng(0, "selection", round)
        ):
            counts[pick.client] += 1
    assert set(np.flatnonzero(counts)) == set(allowed)
    assert p_value(counts[list(allowed)], 200.0) > 0.001


def test_power_of_choice_picks_the_largest_losses_of_candidates_drawn_by_samples():
    samples = tuple([90] * 2 + [10] * (CLIENTS - 2))
    losses = {k: float(k) for k in range(CLIENTS)}
    selector = build_selector(Plugin(name="power_of_choice", d=4))
    drawn = np.zeros(CLIENTS)
    for round in range(500):
        asked = []
        base = situation(federates(samples), losses=losses)
        seen = Situation(
            1,
            base.candidates,
            base.federates,
            {},
            lambda ks, asked=asked: asked.extend(ks) or {k: losses[k] for k in ks},
        )
        picks = selector.select(seen, 2, numpy_rng(0, "selection", round))
        assert len(asked) == 4
        assert {p.client for p in picks} == set(sorted(asked)[-2:])
        drawn[asked] += 1
    assert drawn[:2].min() > 2 * drawn[2:].max()


def test_power_of_choice_with_all_candidates_takes_the_overall_worst():
    losses = {k: float((k * 7) % CLIENTS) for k in range(CLIENTS)}
    picks = build_selector(Plugin(name="power_of_choice", d=CLIENTS)).select(
        situation(federates(), losses=losses), 3, numpy_rng(0, "selection", 1)
    )
    assert {p.client for p in picks} == set(sorted(losses, key=losses.get)[-3:])


def test_power_of_choice_prefers_those_that_answered():
    seen = Situation(1, tuple(range(6)), federates(), {}, lambda ks: {k: 1.0 for k in ks if k % 2})
    picks = build_selector(Plugin(name="power_of_choice", d=6)).select(seen, 3, numpy_rng(0, "selection", 1))
    assert {p.client for p in picks} == {1, 3, 5}


def clustered(facts):
    """Two tight clusters: even and odd clients."""
    directions, whole = Directions(facts), WholeDirections(facts)
    side = torch.tensor([[5.0, 0.0] if k % 2 else [-5.0, 0.0] for k in range(CLIENTS)])
    vectors = side + 0.01 * torch.randn(CLIENTS, 2, generator=torch.Generator().manual_seed(1))
    keys = ("joint", *[f"encoder.{m}" for m in facts.modalities])
    directions.tensors = {f"direction.{key}": vectors.clone() for key in keys}
    whole.tensors = {"direction.whole": vectors.clone()}
    return {"directions": directions, "whole_directions": whole}


def imbalance(facts, accuracy):
    known = Imbalance(facts)
    known.tensors = {"accuracy": torch.tensor([accuracy] * CLIENTS, dtype=torch.float64)}
    return known


@pytest.mark.parametrize("selector", [DivFL(greedy="plain"), DivFL(greedy="plain", vectors="encoders")])
def test_divfl_picks_one_client_of_each_cluster(selector):
    facts = federates()
    knowledge = clustered(facts)
    before = {n: t.clone() for k in knowledge.values() for n, t in k.tensors.items()}
    for seed in range(10):
        picks = selector.select(situation(facts, knowledge=knowledge), 2, numpy_rng(seed, "selection"))
        assert {p.client % 2 for p in picks} == {0, 1}
    assert all(torch.equal(t, before[n]) for k in knowledge.values() for n, t in k.tensors.items())


@pytest.mark.parametrize("accuracy", [(0.9, 0.3), (0.3, 0.9)])
def test_cmsfed_covers_the_weak_modality_and_mirrors(accuracy):
    facts = federates()
    knowledge = clustered(facts) | {"imbalance": imbalance(facts, accuracy)}
    weak = "b" if accuracy[0] > accuracy[1] else "a"
    for seed in range(10):
        picks = CMSFed(greedy="plain").select(situation(facts, knowledge=knowledge), 2, numpy_rng(seed, "selection"))
        assert {p.client % 2 for p in picks} == {0, 1}
        assert {p.modalities for p in picks} == {(weak,)}


def test_cmsfed_below_its_threshold_trains_everything():
    facts = federates()
    knowledge = clustered(facts) | {"imbalance": imbalance(facts, (0.6, 0.5))}
    picks = CMSFed(greedy="plain").select(situation(facts, knowledge=knowledge), 4, numpy_rng(0, "selection"))
    assert {p.modalities for p in picks} == {("a", "b")}


@pytest.mark.parametrize("accuracy", [(0.6, 0.5), (0.9, 0.3)])
@pytest.mark.parametrize("count", [4, CLIENTS, CLIENTS + 1])
@pytest.mark.parametrize("selector", [CMSFed(), DivFL(), DivFL(vectors="encoders"), Uniform()], ids=str)
def test_a_round_gets_the_picks_of_its_selector(selector, count, accuracy):
    facts = federates()
    seen = situation(facts, knowledge=clustered(facts) | {"imbalance": imbalance(facts, accuracy)})
    ours = selector.picks(seen, count, numpy_rng(0, "selection"))
    theirs = selector.select(seen, count, numpy_rng(0, "selection"))
    assert sorted(ours, key=lambda p: p.client) == sorted(theirs, key=lambda p: p.client)


def test_only_the_distances_that_can_decide_are_computed(monkeypatch):
    asked = []
    distances = Directions.distances
    monkeypatch.setattr(Directions, "distances", lambda known, *key: asked.append(key[0]) or distances(known, *key))
    facts = federates()
    for accuracy, count, wanted in (
        ((0.6, 0.5), 4, ["joint"]),
        ((0.6, 0.5), CLIENTS, []),  # all of all
        ((0.9, 0.3), CLIENTS, ["encoder.b"]),  # all of the weak one
    ):
        asked.clear()
        seen = situation(facts, knowledge=clustered(facts) | {"imbalance": imbalance(facts, accuracy)})
        CMSFed().picks(seen, count, numpy_rng(0, "selection"))
        assert asked == wanted


def test_cmsfed_never_asks_a_client_for_a_modality_that_it_lacks():
    owned = tuple((("a", "b"), ("a",), ("b",))[k % 3] for k in range(CLIENTS))
    facts = federates(owned=owned)
    accuracy = torch.tensor([[0.9 if "a" in o else torch.nan, 0.2 if "b" in o else torch.nan] for o in owned])
    known = Imbalance(facts)
    known.tensors = {"accuracy": accuracy.double()}
    knowledge = clustered(facts) | {"imbalance": known}
    shapes = set()
    for seed in range(30):
        picks = CMSFed().select(situation(facts, knowledge=knowledge), 6, numpy_rng(seed, "selection"))
        assert len({p.client for p in picks}) == 6
        for pick in picks:
            assert set(pick.modalities) <= set(owned[pick.client])
            shapes.add((owned[pick.client], pick.modalities))
    assert (("a", "b"), ("b",)) in shapes
    assert (("a",), ("a",)) in shapes


@pytest.mark.parametrize("accuracy", [(0.9, 0.5, 0.2), (0.2, 0.9, 0.5), (0.5, 0.2, 0.9)])
def test_three_modalities_train_the_weakest_alone(accuracy):
    facts = federates(modalities=("a", "b", "c"))
    knowledge = clustered(facts) | {"imbalance": imbalance(facts, accuracy)}
    picks = CMSFed().select(situation(facts, knowledge=knowledge), 3, numpy_rng(0, "selection"))
    assert {p.modalities for p in picks} == {("abc"[accuracy.index(0.2)],)}


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"name": "unifrom"}, "uniform"),
        ({"name": "cmsfed", "thetta": 1}, "theta"),
        ({"name": "divfl", "greedy": "x"}, "greedy"),
    ],
)
def test_mistakes_are_explained(params, match):
    with pytest.raises(ConfigError, match=match):
        build_selector(Plugin(**params))


def test_rounding_does_not_decide_between_mutual_neighbours():
    rng = np.random.default_rng(100_000)
    for _ in range(200):
        v = rng.normal(size=(9, 3))
        D = np.sqrt(((v[:, None] - v) ** 2).sum(2))
        cover = Cover(D)
        cover.add(0)
        pool = list(range(1, 9))
        chosen = cover.best(pool)
        costs = {k: math.fsum(np.minimum(cover.nearest, D[:, k])) for k in pool}
        best = min(costs.values())
        assert chosen == next(k for k in pool if costs[k] <= best * (1 + 1e-12))


def test_uniform_draws_one_client_after_another():
    """As submodular selection does with one random candidate a step, from the same stream."""
    for count in (1, 7, CLIENTS, CLIENTS + 3):
        rng, left, expected = numpy_rng(3, "selection", count), np.arange(CLIENTS), []
        for _ in range(min(count, CLIENTS)):
            expected.append(int(draw(rng, left, 1)[0]))
            left = left[left != expected[-1]]
        picks = build_selector(Plugin(name="uniform")).select(
            situation(federates()), count, numpy_rng(3, "selection", count)
        )
        assert [p.client for p in picks] == expected
