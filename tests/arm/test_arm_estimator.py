"""The ARM-style classifier as a scikit-learn estimator, and what its regulariser does."""

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fedmm.arm.estimator import ARMClassifier
from fedmm.errors import ConfigError, DataError
from fedmm.seeding import numpy_rng

# The second predicts from all columns, and so answers for its accuracy too.
OVERLAPPING = {"all": slice(None), "some": slice(0, 1)}


@parametrize_with_checks([ARMClassifier(), ARMClassifier(modalities=OVERLAPPING, strong="all", eta=0.1)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def sample(seed=0, n=90, classes=3, noise=1.0):
    rng = numpy_rng(seed, "arm")
    y = np.arange(n) % classes
    sound = 2 * rng.normal(size=(classes, 5))[y] + noise * rng.normal(size=(n, 5))
    sight = rng.normal(size=(classes, 4))[y] + 2 * noise * rng.normal(size=(n, 4))
    return {"sight": sight, "sound": sound}, y


@pytest.mark.parametrize("classes", [2, 3])
def test_ways_to_say_which_columns_are_which_agree(classes):
    views, y = sample(classes=classes)
    X = np.hstack([views["sight"], views["sound"]])
    names = [*(f"v{i}" for i in range(4)), *(f"a{i}" for i in range(5))]
    reference = ARMClassifier().fit(views, y)
    assert (reference.strong_, reference.weak_) == ("sound", ("sight",))
    assert reference.score(views, y) > 0.9
    mask = np.arange(9) < 4
    for columns in (
        {"sight": slice(0, 4), "sound": slice(4, 9)},
        {"sound": range(4, 9), "sight": [0, 1, 2, 3]},
        {"sight": mask, "sound": ~mask},
    ):
        fitted = ARMClassifier(modalities=columns).fit(X, y)
        np.testing.assert_allclose(fitted.W_, reference.W_, atol=1e-12)
        assert (fitted.predict(X) == reference.predict(views)).all()
    frame = pd.DataFrame(X, columns=names)
    fitted = ARMClassifier(modalities={"sight": names[:4], "sound": names[4:]}).fit(frame, y)
    np.testing.assert_allclose(fitted.W_, reference.W_, atol=1e-12)
    halves = ARMClassifier().fit(X, y)
    assert (halves.strong_, halves.weak_) == ("second", ("first",))
    np.testing.assert_allclose(halves.W_, reference.W_, atol=1e-12)


def test_prediction_reads_the_strong_modality_alone():
    views, y = sample()
    fitted = ARMClassifier(strong="sight").fit(views, y)
    assert fitted.strong_ == "sight"
    scores = fitted.decision_function(views)
    assert (fitted.decision_function({"sight": views["sight"]}) == scores).all()
    assert (fitted.decision_function({"sight": views["sight"], "sound": np.full((90, 5), np.nan)}) == scores).all()
    X = np.hstack([views["sight"], 100 + views["sound"]])
    assert (fitted.decision_function(X) == scores).all()
    np.testing.assert_allclose(scores.sum(1), 1.0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_labels_permute_with_the_solution(classes):
    views, y = sample(1, classes=classes)
    permutation = numpy_rng(3, "labels").permutation(classes)
    one, other = ARMClassifier(l2=3.0).fit(views, y), ARMClassifier(l2=3.0).fit(views, permutation[y])
    np.testing.assert_allclose(other.W_[:, permutation], one.W_, atol=1e-10)
    np.testing.assert_allclose(other.objective_path_, one.objective_path_, rtol=1e-10)
    assert (other.predict(views) == permutation[one.predict(views)]).all()


def test_binary_scores_are_those_of_labels_of_minus_and_plus_one():
    views, y = sample(2, classes=2)
    ridge = RidgeClassifier(alpha=1.5).fit(views["sound"], y)
    fitted = ARMClassifier(l1=1.5, l2=0.0, strong="sound").fit(views, y)
    np.testing.assert_allclose(fitted.decision_function(views), ridge.decision_function(views["sound"]), atol=1e-10)


def test_a_distant_origin_costs_no_precision():
    views, y = sample()
    near, far = ARMClassifier().fit(views, y), ARMClassifier().fit({m: x + 1e7 for m, x in views.items()}, y)
    np.testing.assert_allclose(far.W_, near.W_, atol=1e-7)
    np.testing.assert_allclose(far.objective_path_, near.objective_path_, rtol=1e-7)


def shortcut(seed):
    """A draw of n samples whose strong modality tells how each was mislabelled; the weak one knows the class alone."""
    rng = numpy_rng(seed, "shortcut")
    centres, marks, other = (rng.normal(size=(4, d)) for d in (10, 10, 12))

    def draw(n, strength):
        y = np.arange(n) % 4
        label = np.where(rng.random(n) < 0.3, rng.integers(4, size=n), y)
        core = 0.6 * centres[y] + rng.normal(size=(n, 10))
        strong = np.hstack([core, strength * marks[label] + rng.normal(size=(n, 10))])
        return {"strong": strong, "weak": other[y] + 1.5 * rng.normal(size=(n, 12))}, y, label

    return draw


def test_regulariser_shifts_weight_off_a_shortcut_that_the_weak_modality_does_not_share():
    gains = []
    for seed in range(6):
        draw = shortcut(seed)
        views, _, label = draw(400, 1.5)
        without_shortcut, truth, _ = draw(4000, 0.0)
        unrelated = {**views, "weak": numpy_rng(seed, "shuffle").permutation(views["weak"])}
        off = ARMClassifier(strong="strong", l2=0.0).fit(views, label)
        on = ARMClassifier(strong="strong").fit(views, label)
        blind = ARMClassifier(strong="strong").fit(unrelated, label)
        reliance = {c: np.linalg.norm(c.W_[10:]) / np.linalg.norm(c.W_[:10]) for c in (off, on, blind)}
        assert reliance[on] < 0.9 * min(reliance[off], reliance[blind])
        right = {c: c.score(without_shortcut, truth) for c in (off, on, blind)}
        assert right[on] > max(right[off], right[blind])
        gains.append(right[on] - right[off])
    assert np.mean(gains) > 0.03


def test_search_and_pipelines():
    views, y = sample(4, noise=2.0)
    X = np.hstack([views["sight"], views["sound"]])
    pipe = make_pipeline(StandardScaler(), ARMClassifier(modalities={"sight": slice(0, 4), "sound": slice(4, None)}))
    assert cross_val_score(pipe, X, y, cv=3).mean() > 0.6
    search = GridSearchCV(pipe, {"armclassifier__l2": [0.0, 1.0], "armclassifier__rank": [1, None]}, cv=3).fit(X, y)
    assert search.best_estimator_[-1].objective_path_.size == search.best_estimator_[-1].n_iter_


def test_stopping_short_warns():
    views, y = sample()
    with pytest.warns(ConvergenceWarning, match="after 1 alternations"):
        fitted = ARMClassifier(max_iter=1).fit(views, y)
    assert fitted.n_iter_ == 1


def test_bad_input_is_named():
    views, y = sample()
    X = np.hstack([views["sight"], views["sound"]])
    frame = pd.DataFrame(X, columns=[f"a{i}" for i in range(9)])
    for modalities, data, message in [
        ({"sight": [0, 9]}, X, r"modalities\.sight: X has no such columns: index 9"),
        ({"sight": ["a0", "b1"]}, frame, r'modalities\.sight: X has no column "b1" \(did you mean'),
        ({"sight": ["a0"]}, X, 'X has no column "a0"'),
        ({"sight": []}, X, r"modalities\.sight: no columns"),
        ({}, X, "modalities: no modality"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ARMClassifier(modalities=modalities).fit(data, y)
    with pytest.raises(ConfigError, match=r'arm\.strong: no modality "sond" \(did you mean "sound"'):
        ARMClassifier(strong="sond").fit(views, y)
    with pytest.raises(ConfigError, match="l1 is 0"):
        ARMClassifier(l1=0).fit(views, y)
    with pytest.raises(DataError, match="modalities of"):
        ARMClassifier().fit({**views, "sight": views["sight"][:5]}, y)
    holed = {**views, "sight": np.where(np.arange(4) == 1, np.nan, views["sight"])}
    with pytest.raises(DataError, match='"sight" has features that are not finite'):
        ARMClassifier().fit(holed, y)
    fitted = ARMClassifier().fit(views, y)
    with pytest.raises(DataError, match='no modality "sound"'):
        fitted.predict({"sight": views["sight"]})
    with pytest.raises(DataError, match='"sound" has 4 columns'):
        fitted.predict({"sound": views["sight"]})
    with pytest.raises(ValueError, match="NaN"):
        fitted.predict({"sound": np.full((2, 5), np.nan)})
