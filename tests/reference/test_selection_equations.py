"""Selection against section 4.5, pick by pick, from the same random stream."""

import numpy as np
import pytest
import selection
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.config.schema import Plugin
from fedmm.seeding import numpy_rng
from server.knowledge import Directions, Federates, Imbalance, WholeDirections, distances
from server.selection import Situation, build_selector
from server.selection.submodular import Cover, DivFL


def situation(rng, clients, uni_modal=0.0, modalities=("m1", "m2")):
    """Random vectors, accuracies and owners."""
    owned = tuple(
        modalities if rng.random() >= uni_modal else (modalities[int(rng.integers(2))],) for _ in range(clients)
    )
    federates = Federates(modalities, owned, tuple(int(n) for n in rng.integers(5, 50, clients)))
    directions, whole, imbalance = Directions(federates), WholeDirections(federates), Imbalance(federates)
    keys = ("joint", *[f"encoder.{m}" for m in modalities])
    directions.tensors = {f"direction.{k}": torch.tensor(rng.normal(size=(clients, 4))) for k in keys}
    whole.tensors = {"direction.whole": torch.tensor(rng.normal(size=(clients, 6)))}
    accuracy = torch.tensor(rng.uniform(0.1, 1.0, (clients, len(modalities))))
    for k, names in enumerate(owned):
        for slot, m in enumerate(modalities):
            if m not in names:
                accuracy[k, slot] = torch.nan
    imbalance.tensors = {"accuracy": accuracy}
    candidates = tuple(sorted(rng.choice(clients, size=int(rng.integers(1, clients + 1)), replace=False).tolist()))
    knowledge = {"directions": directions, "whole_directions": whole, "imbalance": imbalance}
    return Situation(1, candidates, federates, knowledge, lambda ks: dict.fromkeys(ks, 0.0))


def ratios(seen):
    """b_k = acc_1 / acc_2, None without both, and the n-weighted b."""
    accuracy = seen.knowledge["imbalance"].tensors["accuracy"].tolist()
    b = [a1 / a2 if a1 == a1 and a2 == a2 else None for a1, a2 in accuracy]
    known = [(n, r) for n, r in zip(seen.federates.samples, b, strict=True) if r is not None]
    total = sum(n * r for n, r in known) / sum(n for n, _ in known) if known else 1.0
    return [1.0 if r is None else r for r in b], total


@pytest.mark.parametrize("greedy", ["stochastic", "plain"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000),
    theta=st.sampled_from([1.0, 1.5, 2.0, float("inf")]),
    uni_modal=st.sampled_from([0.0, 0.5]),
    clients=st.integers(2, 25),
    m=st.integers(1, 6),
)
def test_balanced_selection(greedy, seed, theta, uni_modal, clients, m):
    seen = situation(np.random.default_rng(seed), clients, uni_modal)
    picks = build_selector(Plugin(name="cmsfed", theta=theta, greedy=greedy)).select(seen, m, numpy_rng(seed, "pick"))

    b, total = ratios(seen)
    modality_1_dominates = total > 1
    weak = "m2" if modality_1_dominates else "m1"
    vectors = seen.knowledge["directions"].tensors
    expected = selection.balanced(
        seen.candidates,
        m,
        clients,
        selection.euclid(vectors["direction.joint"].tolist()),
        selection.euclid(vectors[f"direction.encoder.{weak}"].tolist()),
        b,
        theta,
        modality_1_dominates,
        {k for k, names in enumerate(seen.federates.owned) if weak in names},
        numpy_rng(seed, "pick"),
        size=clients if greedy == "plain" else None,
    )
    owned = seen.federates.owned
    assert [(p.client, p.modalities) for p in picks] == [
        (k, (weak,) if how == "weak" else owned[k]) for k, how in expected
    ]


@pytest.mark.parametrize("vectors", ["whole", "encoders"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(2, 25), m=st.integers(1, 6))
def test_divfl(vectors, seed, clients, m):
    seen = situation(np.random.default_rng(seed), clients)
    picks = DivFL(vectors=vectors).select(seen, m, numpy_rng(seed, "pick"))
    key = ("whole_directions", "direction.whole") if vectors == "whole" else ("directions", "direction.joint")
    D = selection.euclid(seen.knowledge[key[0]].tensors[key[1]].tolist())
    expected = selection.divfl(seen.candidates, m, clients, D, numpy_rng(seed, "pick"))
    assert [p.client for p in picks] == expected
    assert all(p.modalities == ("m1", "m2") for p in picks)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(2, 12), size=st.integers(1, 6))
def test_greedy_cover_is_monotone_and_within_its_guarantee(seed, clients, size):
    rng = np.random.default_rng(seed)
    D = distances(torch.tensor(rng.normal(size=(clients, 3))))
    before, cover, left, sums = D.copy(), Cover(D), list(range(clients)), []
    for _ in range(min(size, clients)):
        chosen = cover.best(left)
        cover.add(chosen)
        left.remove(chosen)
        sums.append(cover.nearest.sum())
    assert sums == sorted(sums, reverse=True)
    assert np.array_equal(D, before)
    assert np.array_equal(D, D.T)
    assert not D.diagonal().any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(2, 15), m=st.integers(1, 5))
def test_power_of_choice(seed, clients, m):
    rng = np.random.default_rng(seed)
    base = situation(rng, clients)
    losses = dict(enumerate(rng.permutation(clients) / 7))
    asked = []

    def ask(ks):
        asked.append(list(ks))
        return {k: losses[k] for k in ks}

    seen = Situation(1, base.candidates, base.federates, {}, ask)
    picks = build_selector(Plugin(name="power_of_choice")).select(seen, m, numpy_rng(seed, "pick"))
    (drawn,) = asked
    assert len(set(drawn)) == len(drawn) == min(len(base.candidates), 2 * m)
    assert [p.client for p in picks] == selection.power_of_choice(drawn, losses, m)


def test_normalised_vectors_are_compared_by_angle():
    far = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
    assert distances(far, normalise=True)[0, 1] == 0
    assert distances(far)[0, 1] == 8
