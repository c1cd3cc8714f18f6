"""The ARM-style classifier as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from fedmm.arm.moments import add, moments
from fedmm.arm.solver import Settings, Solution, solve
from fedmm.errors import ConfigError, DataError, nearest

Columns: TypeAlias = slice | Sequence[int] | Sequence[str] | npt.NDArray[Any]
Matrix: TypeAlias = npt.NDArray[np.float64]


class ARMClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """ARM-style linear classifier, a reconstruction: a strong modality predicts, weak ones regularise its training.

    `fedmm.arm` states the objective, its source and what is reconstructed. Features are used as they are given: bring
    them to one scale first, since `l1` and `mu` are absolute. Binary and multi-class; any number of modalities, and
    with a single one this is ridge classification.

    Args:
        modalities: Modality -> columns of a matrix X: a slice, indices, a mask, or names of a data frame's columns.
            None: the first and the second half, called "first" and "second". Unused where X is a mapping.
        strong: The modality that predicts, or "auto" for the one that explains the labels best by itself.
        rank: Columns of each projection, at most C and the weak modality's width; None: C - 1.
        l1: Ridge penalty, above 0.
        l2: Weight of the weak modalities; 0 is ridge regression.
        eta: Weight of the labels against the predictions in choosing projections.
        mu: Ridge in the projections' constraint, above 0.
        max_iter: Most alternations.
        tol: Stop once an alternation lowers the objective by at most `tol` times the labels' variation.

    Attributes:
        classes_: The C labels.
        strong_: The modality that predicts.
        weak_: All others.
        unexplained_: Modality -> share of the labels' variance left by it alone; the smallest is the strong one's.
        W_: Weights [d, C] of the strong modality.
        intercept_: Offsets [C].
        P_: Weak modality -> projection [e, r].
        objective_path_: Objective after each alternation; never increases.
        n_iter_: Number of alternations.
        columns_: Modality -> its columns in a matrix X; modalities given as a mapping or as moments lie side by side.
        n_features_in_: Number of columns of all modalities.
    """

    def __init__(
        self,
        *,
        modalities: Mapping[str, Columns] | None = None,
        strong: str = "auto",
        rank: int | None = None,
        l1: float = 1.0,
        l2: float = 1.0,
        eta: float = 1.0,
        mu: float = 1e-2,
        max_iter: int = 50,
        tol: float = 1e-7,
    ) -> None:
        self.modalities = modalities
        self.strong = strong
        self.rank = rank
        self.l1 = l1
        self.l2 = l2
        self.eta = eta
        self.mu = mu
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: npt.ArrayLike | Mapping[str, npt.ArrayLike], y: npt.ArrayLike) -> Self:
        """Fit to N samples.

        Args:
            X: Matrix [N, D], or modality -> matrix [N, d]. In a mapping, a row of nothing but NaN says that the sample
                lacks the modality.
            y: Labels [N].

        Raises:
            ValueError: X or y is not what scikit-learn's estimators take.
            ConfigError: A parameter is out of range, or names columns or a modality that X lacks.
            DataError: Fewer than two samples have the strong modality.
        """
        if _is_mapping(X):
            stacked, widths = _side_by_side(X)
            matrix, y = validate_data(self, stacked, y, ensure_min_samples=2, ensure_all_finite="allow-nan")
            columns = _consecutive(widths)
        else:
            matrix, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
            columns = _layout(self.modalities, matrix.shape[1], getattr(self, "feature_names_in_", None))
        check_classification_targets(y)
        classes, labels = np.unique(y, return_inverse=True)
        present = {m: ~np.isnan(matrix[:, c]).all(1) for m, c in columns.items()}
        # Moments about a distant origin would cancel; about the means they cannot.
        origin = {m: matrix[present[m]][:, c].sum(0) / max(present[m].sum(), 1) for m, c in columns.items()}
        sums = moments(
            {m: torch.from_numpy(matrix[:, c] - origin[m]) for m, c in columns.items()},
            torch.from_numpy(labels.astype(np.int64)),
            len(classes),
            {m: torch.from_numpy(p) for m, p in present.items()},
        )
        return self._adopt(solve(sums, self._settings(), self.strong), classes, columns, origin)

    def fit_from_moments(
        self, reports: Iterable[Mapping[str, Tensor]], classes: npt.ArrayLike | Sequence[str] | None = None
    ) -> Self:
        """Fit to the pooled samples of clients that sent `fedmm.arm.moments` alone; equal to `fit` on the pool.

        Args:
            reports: One set of moments a client.
            classes: What the labels 0 to C - 1 stand for; None: themselves.

        Raises:
            ConfigError: A parameter is out of range, or `strong` is unknown.
            DataError: Moments disagree in shape, are not finite, or cover fewer than two samples.
        """
        sums = add(reports)
        solution = solve(sums, self._settings(), self.strong)
        known = np.arange(solution.weight.shape[1]) if classes is None else np.asarray(classes)
        if len(known) != solution.weight.shape[1]:
            raise DataError(f"{len(known)} classes for {solution.weight.shape[1]} columns of labels", where="arm")
        widths = {m: len(sums[f"gram.{m}"]) - 1 for m in solution.unexplained}
        self.n_features_in_ = sum(widths.values())
        columns = _consecutive(widths)
        if self.modalities is not None:
            columns = _layout(self.modalities, self.n_features_in_, None)
        return self._adopt(solution, known, columns, {})

    def decision_function(self, X: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> Matrix:
        """Class scores [N, C]; for two classes the second's score less the first's, [N].

        Args:
            X: Matrix as in `fit`, or a mapping, of which the strong modality alone is read.
        """
        check_is_fitted(self)
        if _is_mapping(X):
            if self.strong_ not in X:
                raise DataError(f'no modality "{self.strong_}"', where="X", remedy="it is the one that predicts")
            view = check_array(X[self.strong_], dtype=np.float64)
            if view.shape[1] != len(self.W_):
                raise DataError(
                    f'"{self.strong_}" has {view.shape[1]} columns', where="X", remedy=f"give {len(self.W_)}"
                )
        else:
            view = validate_data(self, X, dtype=np.float64, reset=False)[:, self.columns_[self.strong_]]
        scores: Matrix = view @ self.W_ + self.intercept_
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> npt.NDArray[Any]:
        """Labels [N] of the largest score; X as in `decision_function`."""
        scores = self.decision_function(X)
        best = (scores > 0).astype(np.intp) if scores.ndim == 1 else scores.argmax(1)
        labels: npt.NDArray[Any] = self.classes_[best]
        return labels

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Without names for the columns the strong modality is one half of them, which may know little by itself.
        tags.classifier_tags.poor_score = self.modalities is None
        return tags

    def _settings(self) -> Settings:
        return Settings(self.rank, self.l1, self.l2, self.eta, self.mu, self.max_iter, self.tol)

    def _adopt(
        self,
        solution: Solution,
        classes: npt.NDArray[Any],
        columns: dict[str, npt.NDArray[np.intp]],
        origin: Mapping[str, Matrix],
    ) -> Self:
        if not solution.converged:
            warnings.warn(
                f"the objective still fell after {self.max_iter} alternations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.classes_ = classes
        self.columns_ = columns
        self.strong_ = solution.strong
        self.weak_ = tuple(m for m in solution.unexplained if m != solution.strong)
        self.unexplained_ = solution.unexplained
        self.W_ = solution.weight.numpy()
        self.intercept_ = solution.bias.numpy() - origin.get(solution.strong, np.zeros(len(self.W_))) @ self.W_
        self.P_ = {m: p.numpy() for m, p in solution.projections.items()}
        self.objective_path_ = np.asarray(solution.objective_path)
        self.n_iter_ = len(self.objective_path_)
        return self


def _is_mapping(X: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> TypeGuard[Mapping[str, npt.ArrayLike]]:
    # One of SciPy's sparse matrices is a dictionary too; scikit-learn's own check turns it away.
    return isinstance(X, Mapping) and not issparse(X)


def _side_by_side(views: Mapping[str, npt.ArrayLike]) -> tuple[Matrix, dict[str, int]]:
    arrays = {m: check_array(x, dtype=np.float64, ensure_all_finite="allow-nan") for m, x in views.items()}
    if len({len(a) for a in arrays.values()}) != 1:
        raise DataError(f"modalities of {[len(a) for a in arrays.values()]} rows", where="X", remedy="align the rows")
    return np.hstack(list(arrays.values())), {m: a.shape[1] for m, a in arrays.items()}


def _consecutive(widths: Mapping[str, int]) -> dict[str, npt.NDArray[np.intp]]:
    ends = np.cumsum(list(widths.values()))
    return {m: np.arange(end - width, end) for (m, width), end in zip(widths.items(), ends, strict=True)}


def _layout(
    modalities: Mapping[str, Columns] | None, width: int, feature_names: npt.NDArray[Any] | None
) -> dict[str, npt.NDArray[np.intp]]:
    """Indices of each modality's columns in a matrix of `width` columns."""
    if modalities is None:
        half = width // 2
        return _consecutive({"first": half, "second": width - half} if half else {"first": width})
    position = {} if feature_names is None else {name: i for i, name in enumerate(feature_names)}
    found: dict[str, npt.NDArray[np.intp]] = {}
    for m, columns in modalities.items():
        where = f"modalities.{m}"
        wanted: Any = columns
        if not isinstance(columns, slice) and any(isinstance(c, str) for c in columns):
            if unknown := [str(c) for c in columns if c not in position]:
                raise ConfigError(f'X has no column "{unknown[0]}"', where=where, remedy=nearest(unknown[0], position))
            wanted = [position[c] for c in columns]
        try:
            found[m] = np.arange(width)[wanted]
        except IndexError as error:
            raise ConfigError(f"X has no such columns: {error}", where=where, remedy=f"X has {width}") from error
        if not found[m].size:
            raise ConfigError("no columns", where=where, remedy="name at least one")
    if not found:
        raise ConfigError("no modality", where="modalities", remedy="name at least one, or give None for two halves")
    return found
