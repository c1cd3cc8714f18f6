"""The ARM-style solver against its equations, written out with n x n matrices, and the properties of the problem."""

import arm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from fedmm.arm import Settings, moments, solve
from fedmm.errors import ConfigError, DataError
from fedmm.seeding import numpy_rng

NAMES = ("depth", "audio", "text")
"""Not in alphabetical order, so that a mix-up of orders shows."""


def sample(seed, n=40, widths=(5, 3), classes=3, missing=0.0):
    """{modality: [n, d]} with rows of NaN where absent, labels; every modality knows something of the label."""
    rng = numpy_rng(seed, "arm")
    y = np.concatenate([np.arange(classes), rng.integers(classes, size=n - classes)])
    views = {}
    for m, d in zip(NAMES, widths, strict=False):
        views[m] = rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d)) + 3 * rng.normal(size=d)
        views[m][rng.random(n) < missing] = np.nan
        views[m][:2] = rng.normal(size=(2, d))
    return views, y


def summed(views, y, classes):
    tensors = {m: torch.from_numpy(x) for m, x in views.items()}
    present = {m: torch.from_numpy(arm.owned(x)) for m, x in views.items()}
    return moments(tensors, torch.from_numpy(y), classes, present)


def centred(views, y, classes):
    return *(arm.centre(views[m]) for m in ("depth", "audio")), arm.centre(arm.onehot(y, classes))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    n=st.sampled_from([12, 40]),
    widths=st.sampled_from([(4,), (5, 3), (3, 6), (30, 2), (4, 3, 5)]),
    classes=st.integers(2, 4),
    missing=st.sampled_from([0.0, 0.3]),
    rank=st.sampled_from([None, 0, 1, 9]),
    l2=st.sampled_from([0.0, 0.5, 20.0]),
    eta=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_solution_is_the_literal_one(seed, n, widths, classes, missing, rank, l2, eta):
    views, y = sample(seed, n, widths, classes, missing)
    options = {"l1": 0.7, "l2": l2, "eta": eta, "mu": 0.1}
    solution = solve(summed(views, y, classes), Settings(rank, **options), strong="depth")
    r = classes - 1 if rank is None else min(rank, classes)
    W, b, P, path = arm.ARM(views, y, classes, "depth", len(solution.objective_path), r=r, **options)
    np.testing.assert_allclose(solution.weight.numpy(), W, atol=1e-6)
    np.testing.assert_allclose(solution.bias.numpy(), b, atol=1e-6)
    np.testing.assert_allclose(solution.objective_path, path, rtol=1e-6, atol=1e-6)
    assert set(solution.projections) == set(P)
    for m, weight, _, Z, _ in arm.pairs(views, y, classes, "depth", l2):
        if weight:
            np.testing.assert_allclose(arm.H(Z, solution.projections[m].numpy()), arm.H(Z, P[m]), atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    widths=st.sampled_from([(5, 3), (12, 12), (4, 3, 5)]),
    classes=st.integers(2, 5),
    missing=st.sampled_from([0.0, 0.3]),
    l2=st.sampled_from([0.1, 1.0, 100.0]),
    eta=st.sampled_from([0.0, 1.0]),
)
def test_objective_never_increases_and_is_bounded(seed, widths, classes, missing, l2, eta):
    views, y = sample(seed, 40, widths, classes, missing)
    solution = solve(summed(views, y, classes), Settings(l2=l2, eta=eta, tol=0.0, max_iter=30), "depth")
    path = np.array(solution.objective_path)
    assert len(path) >= 2
    assert (np.diff(path) <= 1e-10 * np.abs(path).max()).all()
    paired = arm.pairs(views, y, classes, "depth", l2)
    assert path[-1] >= -eta * sum(weight * np.sum(Y**2) for _, weight, _, _, Y in paired)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("mu", [1e-3, 1e-1])
def test_projection_meets_its_constraint(scale, mu):
    views, y = sample(1, widths=(5, 6), classes=4)
    views["audio"] *= scale
    _, Z, _ = centred(views, y, 4)
    P = solve(summed(views, y, 4), Settings(mu=mu), "depth").projections["audio"].numpy()
    assert np.abs(P.T @ (Z.T @ Z + mu * np.eye(6)) @ P - np.eye(3)).max() < 1e-8
    spectrum = np.linalg.eigvalsh(arm.H(Z, P))
    assert spectrum.min() > -1e-10
    assert spectrum.max() < 1 + 1e-10


def test_no_other_weights_and_no_other_projection_are_better():
    views, y = sample(2, widths=(5, 6), classes=4)
    X, Z, Y = centred(views, y, 4)
    l1, l2, eta, mu = 0.5, 3.0, 0.4, 0.1
    solution = solve(summed(views, y, 4), Settings(None, l1, l2, eta, mu, 500, 0.0), "depth")
    H = torch.from_numpy(arm.H(Z, solution.projections["audio"].numpy()))
    W = solution.weight.clone().requires_grad_()
    X_, Y_ = torch.from_numpy(X), torch.from_numpy(Y)
    F = X_ @ W
    J = (
        (F - Y_).square().sum()
        + l1 * W.square().sum()
        + l2 * (F * (F - H @ F)).sum()
        - l2 * eta * (Y_ * (H @ Y_)).sum()
    )
    assert J.item() == pytest.approx(solution.objective_path[-1], rel=1e-9)
    (gradient,) = torch.autograd.grad(J, W)
    assert gradient.abs().max() < 1e-9
    rng = numpy_rng(0, "feasible")
    inverse_root = np.linalg.inv(np.linalg.cholesky(Z.T @ Z + mu * np.eye(6))).T
    for _ in range(200):
        P = inverse_root @ np.linalg.qr(rng.normal(size=(6, 3)))[0]
        other = arm.J(solution.weight.numpy(), {"audio": P}, views, y, 4, "depth", l1, l2, eta)
        assert other >= solution.objective_path[-1] - 1e-9


@pytest.mark.parametrize("classes", [2, 4])
def test_without_the_regulariser_it_is_ridge_regression(classes):
    views, y = sample(3, classes=classes)
    ridge = Ridge(alpha=2.0).fit(views["depth"], arm.onehot(y, classes))
    solution = solve(summed(views, y, classes), Settings(l1=2.0, l2=0.0), "depth")
    np.testing.assert_allclose(solution.weight.numpy(), ridge.coef_.T, atol=1e-10)
    np.testing.assert_allclose(solution.bias.numpy(), ridge.intercept_, atol=1e-10)
    alone = solve(summed({"depth": views["depth"]}, y, classes), Settings(l1=2.0, l2=5.0))
    np.testing.assert_allclose(alone.weight.numpy(), ridge.coef_.T, atol=1e-10)
    other = solve(summed(views, y, classes), Settings(l1=2.0, l2=1.0), "depth")
    assert np.abs(other.weight.numpy() - ridge.coef_.T).max() > 1e-2


def test_rank_zero_is_ridge_regression_on_a_heavier_gram():
    views, y = sample(4)
    X, _, Y = centred(views, y, 3)
    expected = np.linalg.solve((1 + 2.5) * X.T @ X + 0.3 * np.eye(5), X.T @ Y)
    solution = solve(summed(views, y, 3), Settings(rank=0, l1=0.3, l2=2.5), "depth")
    np.testing.assert_allclose(solution.weight.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_strong_modality_is_the_one_that_explains_most(missing):
    views, y = sample(5, 60, (4, 4, 4), 3, missing)
    shown = arm.owned(views["text"])
    views["text"][shown] = arm.onehot(y, 3)[shown] @ np.ones((3, 4)).cumsum(0) + 0.1 * views["text"][shown]
    solution = solve(summed(views, y, 3), Settings(l1=0.6))
    for m, x in views.items():
        assert solution.unexplained[m] == pytest.approx(arm.GCV(x, y, 3, 0.6), rel=1e-9)
    assert solution.strong == min(solution.unexplained, key=solution.unexplained.get) == "text"


def test_a_modality_seen_with_one_class_alone_is_not_the_strong_one():
    views, y = sample(6, 40)
    views["audio"][y != 0] = np.nan
    assert solve(summed(views, y, 3)).strong == "depth"


def test_a_modality_that_interpolates_the_labels_is_not_the_strong_one():
    views, y = sample(6, 12, (30, 3))
    solution = solve(summed(views, y, 3), Settings(l1=1e-9))
    assert solution.strong == "audio"
    assert solution.unexplained["depth"] == np.inf


def test_a_weak_modality_never_seen_with_the_strong_one_changes_nothing():
    views, y = sample(7, 40)
    views["depth"][:20], views["audio"][20:] = np.nan, np.nan
    solution = solve(summed(views, y, 3), Settings(l2=5.0), "depth")
    alone = solve(summed({"depth": views["depth"]}, y, 3), Settings(l2=0.0), "depth")
    assert solution.projections == {}
    assert torch.equal(solution.weight, alone.weight)


def test_absent_rows_are_never_read():
    views, y = sample(8, 40, missing=0.4)
    other = {m: np.where(np.isnan(x), 1e9, x) for m, x in views.items()}
    present = {m: torch.from_numpy(arm.owned(x)) for m, x in views.items()}
    got = moments({m: torch.from_numpy(x) for m, x in other.items()}, torch.from_numpy(y), 3, present)
    for name, tensor in summed(views, y, 3).items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("option", "value"),
    [("l1", 0.0), ("mu", -1.0), ("l2", -0.1), ("eta", float("nan")), ("tol", -1.0), ("max_iter", 0), ("rank", -1)],
)
def test_settings_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=f"^arm: {option} is"):
        Settings(**{option: value})


def test_bad_input_is_named():
    views, y = sample(9)
    sums = summed(views, y, 3)
    with pytest.raises(ConfigError, match=r'no modality "dept".*did you mean "depth"'):
        solve(sums, strong="dept")
    with pytest.raises(DataError, match=r"moment cross\.audio is not finite"):
        solve(sums | {"cross.audio": sums["cross.audio"] * float("nan")})
    with pytest.raises(DataError, match="fewer than two samples"):
        solve(summed({m: x[:1] for m, x in views.items()}, y[:1], 3), strong="depth")
    with pytest.raises(DataError, match="fewer than two samples"):
        solve({})
    with pytest.raises(DataError, match="labels run from 0 to 2"):
        summed(views, y, 2)
    with pytest.raises(DataError, match="not finite"):
        moments({"a": torch.tensor([[1.0, float("nan")]])}, torch.tensor([0]), 2)
    with pytest.raises(DataError, match="do not fit 3 labels"):
        moments({"a": torch.zeros(2, 4)}, torch.tensor([0, 1, 0]), 2)
    with pytest.raises(DataError, match="cannot name a modality"):
        moments({"a.b": torch.zeros(1, 4)}, torch.tensor([0]), 2)
    flat = {"a": np.repeat(views["depth"][:, :1] * 1e9, 3, axis=1)}
    with pytest.raises(ConfigError, match="l1 is too small"):
        solve(summed(flat, y, 3), Settings(l1=1e-12))
