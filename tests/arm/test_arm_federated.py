"""One round of second moments gives the pooled ARM-style classifier, whoever owns what."""

import numpy as np
import pytest
import torch

from fedmm.arm import add, moments
from fedmm.arm.estimator import ARMClassifier
from fedmm.errors import DataError
from fedmm.seeding import numpy_rng
from server.aggregation import merge_reports

WIDTHS = {"sound": 6, "sight": 4, "touch": 3}


def sample(classes, n=120, modalities=("sound", "sight"), seed=0):
    rng = numpy_rng(seed, "arm")
    y = np.arange(n) % classes
    views = {
        m: rng.normal(size=(classes, WIDTHS[m]))[y] + rng.normal(size=(n, WIDTHS[m])) + rng.normal() for m in modalities
    }
    return views, y


def report(views, y, rows, classes):
    """What a client with these rows sends; a modality without a single row is one that it does not own."""
    owned = {m: x[rows] for m, x in views.items() if not np.isnan(x[rows]).all() or not len(rows)}
    return moments(
        {m: torch.from_numpy(x) for m, x in owned.items()},
        torch.from_numpy(y[rows]),
        classes,
        {m: torch.from_numpy(~np.isnan(x).all(1)) for m, x in owned.items()},
    )


def assert_equal(views, y, parts, **options):
    classes = len(np.unique(y))
    pooled = ARMClassifier(**options).fit(views, y)
    federated = ARMClassifier(**options).fit_from_moments(report(views, y, rows, classes) for rows in parts)
    assert federated.strong_ == pooled.strong_
    np.testing.assert_allclose(federated.W_, pooled.W_, rtol=0, atol=1e-10)
    np.testing.assert_allclose(federated.intercept_, pooled.intercept_, rtol=0, atol=1e-10)
    np.testing.assert_allclose(federated.objective_path_, pooled.objective_path_, rtol=1e-10)
    for m, P in pooled.P_.items():
        np.testing.assert_allclose(federated.P_[m] @ federated.P_[m].T, P @ P.T, rtol=0, atol=1e-10)
    for m, share in pooled.unexplained_.items():
        assert federated.unexplained_[m] == pytest.approx(share, rel=1e-10)
    whole = {pooled.strong_: views[pooled.strong_][~np.isnan(views[pooled.strong_]).all(1)]}
    assert (federated.predict(whole) == pooled.predict(whole)).all()
    return pooled


def blocks(*sizes):
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sizes", [(120,), (60, 60), (1, 2, 90, 0, 7, 17, 3)], ids=["one", "two", "unequal"])
@pytest.mark.parametrize("strong", ["auto", "sight"])
def test_federated_is_pooled(classes, sizes, strong):
    views, y = sample(classes)
    fitted = assert_equal(views, y, blocks(*sizes), strong=strong)
    assert fitted.weak_
    assert set(fitted.P_) == set(fitted.weak_)


@pytest.mark.parametrize("classes", [2, 4])
def test_clients_may_lack_classes(classes):
    views, y = sample(classes)
    one_class_each = [np.flatnonzero(y == c) for c in range(classes)]
    assert_equal(views, y, one_class_each)
    lacking = [np.flatnonzero((y != 0) & (np.arange(120) % 3 == 0))]
    assert_equal(views, y, [*lacking, np.setdiff1d(np.arange(120), lacking[0])])


@pytest.mark.parametrize(
    ("modalities", "strong"),
    [(("sound", "sight"), s) for s in ("auto", "sound", "sight")] + [(tuple(WIDTHS), s) for s in ("auto", *WIDTHS)],
)
def test_clients_may_lack_modalities(modalities, strong):
    views, y = sample(3, modalities=modalities)
    views["sight"][20:60] = np.nan  # All of the second client,
    views["sound"][100:] = np.nan  # all of the last,
    views["sight"][60:100:7] = np.nan  # and some samples of the third.
    views["sound"][61:100:7] = np.nan
    parts = blocks(20, 40, 40, 20)
    assert "gram.sight" not in report(views, y, parts[1], 3)
    assert_equal(views, y, parts, strong=strong, l2=2.0)


def test_sums_do_not_depend_on_who_adds_them():
    views, y = sample(3)
    reports = [report(views, y, rows, 3) for rows in blocks(30, 50, 40)]
    ours, tree = add(reports), merge_reports(reports)
    assert ours.keys() == tree.keys() == report(views, y, np.arange(120), 3).keys()
    for name in ours:
        torch.testing.assert_close(ours[name], tree[name], rtol=1e-12, atol=1e-12)


def test_what_a_client_sends_has_the_stated_names_and_shapes():
    views, y = sample(4, modalities=("sound", "sight", "touch"))
    for rows in (np.arange(120), np.arange(1), np.arange(0)):
        sent = report(views, y, rows, 4)
        assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == {
            "gram.sound": (7, 7),
            "gram.sight": (5, 5),
            "gram.touch": (4, 4),
            "gram.sight.sound": (11, 11),
            "gram.sight.touch": (8, 8),
            "gram.sound.touch": (10, 10),
            "cross.sound": (7, 4),
            "cross.sight": (5, 4),
            "cross.touch": (4, 4),
            "cross.sight.sound": (11, 4),
            "cross.sight.touch": (8, 4),
            "cross.sound.touch": (10, 4),
        }
        assert all(tensor.dtype == torch.float64 for tensor in sent.values())
        assert sent["gram.sight.sound"][-1, -1] == len(rows)


def test_class_names_are_the_callers():
    views, y = sample(3)
    fitted = ARMClassifier().fit_from_moments([report(views, y, np.arange(120), 3)], ["bat", "cat", "dog"])
    assert set(fitted.predict(views)) == {"bat", "cat", "dog"}
    side_by_side = np.hstack([views["sight"], views["sound"]])  # In the order of the names.
    assert (fitted.predict(side_by_side) == fitted.predict(views)).all()
    with pytest.raises(DataError, match="2 classes for 3 columns"):
        ARMClassifier().fit_from_moments([report(views, y, np.arange(120), 3)], ["bat", "cat"])


def test_clients_that_disagree_are_named():
    views, y = sample(3)
    narrow = {m: x[:, :2] for m, x in views.items()}
    with pytest.raises(DataError, match=r"clients sent gram\.sight as \[5, 5\] and as \[3, 3\]"):
        add([report(views, y, np.arange(60), 3), report(narrow, y, np.arange(60), 3)])
