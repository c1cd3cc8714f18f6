import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.config.schema import DataConfig
from fedmm.data.sources import synthetic as S
from fedmm.data.validate import problems
from fedmm.errors import ConfigError


def subsets(names):
    return [s for r in range(len(names) + 1) for s in itertools.combinations(names, r)]


def posterior_accuracy(dials, seen, y, symbols):
    """Accuracy of the Bayes classifier on samples, its posterior summed over ways and labels by brute force."""
    c, m = dials.classes, len(dials.modalities)
    labels = np.arange(c)

    def shown(j, symbol, value):
        match = symbol[:, None] == value[None, :]
        return np.where(match, 1 - dials.noise[j] + dials.noise[j] / c, dials.noise[j] / c)

    score = np.zeros((len(y), c))
    ways = [*[(dials.unique[j], {j}) for j in range(m)], (dials.redundant, set(range(m)))]
    ways.append((1 - sum(dials.unique) - dials.redundant - dials.synergy, set()))
    for share, direct in ways:
        likelihood = np.full((len(y), c), share)
        for j in seen:
            o = symbols[:, j]
            if j in direct:
                likelihood *= np.where(((o >= 0) & (o < c))[:, None], shown(j, o, labels), 0.0)
            else:
                likelihood *= (o == -1)[:, None]
        score += likelihood
    synergetic = np.full((len(y), c), dials.synergy)
    for j in seen:
        synergetic *= (symbols[:, j] >= c)[:, None] / c
    if len(seen) == m:
        # P(observed symbols | y) by summing over the true symbols of all but the last modality.
        exact = np.zeros((len(y), c))
        for parts in itertools.product(range(c), repeat=m - 1):
            term = np.ones((len(y), c))
            for j, a in enumerate(parts):
                term *= shown(j, symbols[:, j] - c, np.array([a]))
            exact += term * shown(m - 1, symbols[:, -1] - c, (labels - sum(parts)) % c)
        synergetic *= exact
    score += synergetic
    return (score.argmax(axis=1) == y).mean()


@pytest.mark.parametrize(
    "params",
    [
        {"classes": 4},
        {
            "classes": 3,
            "modalities": 3,
            "unique": [0.2, 0.1, 0.0],
            "redundant": 0.4,
            "synergy": 0.2,
            "noise": [0, 0.3, 0.6],
        },
        {"classes": 5, "unique": 0.0, "redundant": 0.5, "synergy": 0.5, "noise": {"m1": 0.2, "m2": 0.5}},
        {"classes": 2, "modalities": 3, "unique": 0.0, "redundant": 1.0, "synergy": 0.0, "noise": 0.5},
    ],
)
def test_the_bayes_classifier_reaches_the_stated_accuracy(params):
    n = 40_000
    dials = S.read_dials(params)
    y, symbols = S.draw(dials, n, np.random.default_rng(7))
    for subset in subsets(dials.modalities):
        stated = S.bayes_accuracy(params, subset)
        seen = [dials.modalities.index(name) for name in subset]
        assert posterior_accuracy(dials, seen, y, symbols) == pytest.approx(stated, abs=4 * 0.5 / n**0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(2, 5))
def test_vote_accuracy_is_the_sum_over_all_observations(noise, classes):
    total = 0.0
    for seen in itertools.product(range(classes), repeat=len(noise)):
        total += max(
            np.prod([1 - v + v / classes if o == label else v / classes for o, v in zip(seen, noise, strict=True)])
            for label in range(classes)
        )
    assert S.vote_accuracy(noise, classes) == pytest.approx(total / classes)


@pytest.mark.parametrize("preset", list(S.PRESETS))
@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_more_modalities_never_hurt(preset, modalities):
    params = {"modalities": modalities}
    names = S.read_dials(params, preset).modalities
    accuracy = {frozenset(s): S.bayes_accuracy(params, s, preset) for s in subsets(names)}
    assert accuracy[frozenset()] == pytest.approx(1 / 8)
    assert all(accuracy[a] <= accuracy[b] + 1e-12 for a in accuracy for b in accuracy if a <= b)


def test_the_presets_are_what_they_say():
    assert S.bayes_accuracy({}, ["m1"], "imbalanced") > S.bayes_accuracy({}, ["m2"], "imbalanced") + 0.2
    assert S.bayes_accuracy({}, ["m1"], "balanced") == S.bayes_accuracy({}, ["m2"], "balanced")
    assert S.bayes_accuracy({}, ["m1"], "synergy") == pytest.approx(1 / 8)
    assert S.bayes_accuracy({}, ["m1", "m2"], "synergy") == pytest.approx(1.0)
    assert S.bayes_accuracy({}, ["m1"], "redundant") == S.bayes_accuracy({}, ["m1", "m2"], "redundant")
    assert S.bayes_accuracy({}, ["m1", "m2"], "unique") == pytest.approx(1.0)


def test_vectors_determine_symbols():
    dials = S.read_dials({"classes": 4, "spread": 0.49})
    _, symbols = S.draw(dials, 5000, np.random.default_rng(0))
    x = S.emit(dials, 0, symbols[:, 0], np.random.default_rng(1))
    shown = x[:, :8] > 0.5
    assert np.array_equal(np.where(shown.any(axis=1), shown.argmax(axis=1), -1), symbols[:, 0])


def test_names_and_sizes_can_be_chosen():
    cfg = DataConfig(
        name="synthetic",
        params={"modalities": ["eeg", "ecg", "emg"], "classes": 5, "dims": {"eeg": 40, "ecg": 12, "emg": 10}},
    )
    data = S.load(cfg)
    assert problems(data) == []
    assert [s.shape for s in data.specs.values()] == [(40,), (12,), (10,)]
    assert np.bincount(data.split).tolist() == [2000, 500, 1000]
    for m in data.specs:
        train = data.x[m][data.split == 0]
        assert abs(train.mean()) < 1e-4
        assert train.std() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("params", "place"),
    [
        ({"modalities": 1}, "modalities"),
        ({"modalities": ["a", "a"]}, "modalities"),
        ({"modalities": "ab"}, "modalities"),
        ({"classes": 1}, "classes"),
        ({"classes": 2.5}, "classes"),
        ({"dims": 3}, "dims"),
        ({"dims": 30.5}, "dims"),
        ({"noise": [0.1]}, "noise"),
        ({"noise": {"m1": 0.1}}, "noise"),
        ({"noise": 1.5}, "noise"),
        ({"noise": True}, "noise"),
        ({"spread": 0.5}, "spread"),
        ({"unique": 0.9}, "data.params"),
        ({"redundant": -0.1}, "redundant"),
        ({"synergy": "much"}, "synergy"),
        ({"nois": 0.1}, 'did you mean "noise"'),
    ],
)
def test_impossible_dials_are_refused(params, place):
    with pytest.raises(ConfigError, match=place) as caught:
        S.load(DataConfig(name="synthetic", params=params))
    assert caught.value.exit_code == 2


def test_the_oracle_refuses_unknown_modalities():
    with pytest.raises(ConfigError, match="m3"):
        S.bayes_accuracy({}, ["m3"])
