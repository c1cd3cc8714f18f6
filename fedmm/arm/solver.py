"""The ARM-style alternation on second moments: a closed-form linear head on the strong modality (equations 1 to 3).

The features may be raw or an encoder's; `fedmm.arm` states the problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmm.arm.moments import Centred, centred, names_in
from fedmm.errors import ConfigError, DataError, nearest
from fedmm.types import Tensors

_ROUNDING = 1e-6
"""Shares below this count as zero where their squares matter, which drown in float64's rounding."""


@dataclass(frozen=True)
class Settings:
    """Weights of the objective and when to stop.

    Attributes:
        rank: Columns r of each projection, at most C and the weak modality's width; None: C - 1.
        l1: Ridge penalty on W, above 0.
        l2: Weight of the weak modalities, at least 0; 0 is ridge regression. Large values shrink all scores towards
            the class shares, because no projection of finite rank holds predictions whole: begin near 1.
        eta: Weight of the labels against the predictions in choosing projections, at least 0.
        mu: Ridge in the projections' constraint, above 0.
        max_iter: Most alternations.
        tol: Stop once an alternation lowers the objective by at most `tol` ||Y||^2.

    Raises:
        ConfigError: A value is out of range.
    """

    rank: int | None = None
    l1: float = 1.0
    l2: float = 1.0
    eta: float = 1.0
    mu: float = 1e-2
    max_iter: int = 50
    tol: float = 1e-7

    def __post_init__(self) -> None:
        for name in ("l1", "mu"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}", where="arm", remedy="give a number above 0")
        for name in ("l2", "eta", "tol"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}", where="arm", remedy="give 0 or a number above")
        if self.max_iter < 1:
            raise ConfigError(f"max_iter is {self.max_iter}", where="arm", remedy="give 1 or more")
        if self.rank is not None and self.rank < 0:
            raise ConfigError(f"rank is {self.rank}", where="arm", remedy="give 0 or more, or None for C - 1")


@dataclass(frozen=True)
class Solution:
    """A linear head on the strong modality, and how it came about.

    Attributes:
        strong: The modality that predicts.
        weight: W [d, C] (an `nn.Linear` holds its transpose).
        bias: b [C]; class scores are x W + b.
        projections: Weak modality -> P [e, <= r]; those never seen together with the strong one have none.
        objective_path: J after each alternation.
        unexplained: Modality -> the score by which the strong one is found (`unexplained`).
        converged: The last alternation lowered J by no more than the tolerance.
    """

    strong: str
    weight: Tensor
    bias: Tensor
    projections: Tensors
    objective_path: tuple[float, ...]
    unexplained: dict[str, float]
    converged: bool


@dataclass(frozen=True)
class _Pair:
    """One weak modality beside the strong one, on the samples that have both."""

    strength: float
    """l2 / (number of weak modalities) * n / n_p."""
    xx: Tensor
    """X'X [d, d]."""
    zx: Tensor
    """Z'X [e, d]."""
    zy: Tensor
    """Z'Y [e, C]."""
    factor: Tensor
    """Lower Cholesky factor of Z'Z + mu I [e, e]."""


def solve(sums: Mapping[str, Tensor], settings: Settings | None = None, strong: str = "auto") -> Solution:
    """The ARM-style head from pooled second moments.

    Args:
        sums: `fedmm.arm.moments.moments`, added over clients.
        settings: Weights and stopping rule.
        strong: The modality that predicts, or "auto" for the one that explains the labels best by itself.

    Raises:
        ConfigError: `strong` is unknown, or `l1` or `mu` is too small for float64.
        DataError: The moments are not finite, or the strong modality has fewer than two samples.
    """
    settings = settings or Settings()
    names = names_in(sums)
    if bad := [name for name, tensor in sums.items() if not bool(torch.isfinite(tensor).all())]:
        raise DataError(f"moment {bad[0]} is not finite", where="arm", remedy="leave out the client that sent it")
    scores = {m: unexplained(view, settings.l1) if (view := centred(sums, m)) else float("inf") for m in names}
    if strong != "auto" and strong not in names:
        raise ConfigError(f'no modality "{strong}"', where="arm.strong", remedy=nearest(strong, [*names, "auto"]))
    chosen = min(names, key=scores.__getitem__, default="") if strong == "auto" else strong
    view = centred(sums, chosen) if chosen else None
    if view is None:
        raise DataError(
            f'fewer than two samples have the strong modality "{chosen}"', where="arm", remedy="name another"
        )
    pairs = _pairs(sums, chosen, view, settings)

    rank = view.cross.shape[1] - 1 if settings.rank is None else settings.rank
    weight = _ridge(view, settings.l1)
    path: list[float] = []
    converged = False
    while not converged and len(path) < settings.max_iter:
        projections = {m: _project(pair, weight, settings.eta, rank) for m, pair in pairs.items()}
        weight = _predictor(view, pairs, projections, settings.l1)
        path.append(_objective(view, pairs, projections, weight, settings))
        converged = len(path) > 1 and path[-2] - path[-1] <= settings.tol * view.energy
    return Solution(
        strong=chosen,
        weight=weight,
        bias=view.label_mean - view.mean @ weight,
        projections=projections,
        objective_path=tuple(path),
        unexplained=scores,
        converged=converged,
    )


def unexplained(view: Centred, l1: float) -> float:
    """Generalised cross-validation of ridge regression, as a share of the labels' variance; smaller is stronger.

    (RSS / ||Y||^2) / (1 - (1 + df) / n)^2 with df = tr((X'X + l1 I)^-1 X'X). Unlike cross-validated accuracy it
    follows from second moments, needs no folds, and is the same for clients and pool. Labels without any variance, or
    that the features interpolate, tell nothing: infinity. Source: Golub, Heath and Wahba, Technometrics 21 (1979); the
    1 is the mean's.
    """
    if view.energy <= 1e-12 * view.count:
        return float("inf")
    factor = _cholesky(view.gram + l1 * _eye(view.gram), "l1")
    weight = torch.cholesky_solve(view.cross, factor)
    freedom = 1 + float(torch.cholesky_solve(view.gram, factor).diagonal().sum())
    left = 1 - freedom / view.count
    return _residual(view, weight) / view.energy / left**2 if left > _ROUNDING else float("inf")


def _pairs(sums: Mapping[str, Tensor], strong: str, view: Centred, settings: Settings) -> dict[str, _Pair]:
    both = {m: pair for m in names_in(sums) if m != strong and (pair := centred(sums, strong, m)) is not None}
    d = len(view.gram)
    found: dict[str, _Pair] = {}
    for m, pair in both.items():
        zz = pair.gram[d:, d:]
        found[m] = _Pair(
            strength=settings.l2 / len(both) * view.count / pair.count,
            xx=pair.gram[:d, :d],
            zx=pair.gram[d:, :d],
            zy=pair.cross[d:],
            factor=_cholesky(zz + settings.mu * _eye(zz), "mu"),
        )
    return found


def _ridge(view: Centred, l1: float) -> Tensor:
    return _solve_positive(view.gram + l1 * _eye(view.gram), view.cross)


def _project(pair: _Pair, weight: Tensor, eta: float, rank: int) -> Tensor:
    """P [e, r] of equation 2, from singular vectors: the left matrix is K K', K = [Z'XW, sqrt(eta) Z'Y].

    Directions with rho = 0 explain nothing and are arbitrary but for rounding, so they are left out of P.
    """
    targets = torch.cat([pair.zx @ weight, eta**0.5 * pair.zy], 1)
    whitened = torch.linalg.solve_triangular(pair.factor, targets, upper=False)
    left, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    useful = int((values > _ROUNDING * values[:1]).sum())
    kept = left[:, : min(rank, weight.shape[1], useful)]
    projection: Tensor = torch.linalg.solve_triangular(pair.factor.T, kept, upper=True)
    return projection


def _predictor(view: Centred, pairs: Mapping[str, _Pair], projections: Tensors, l1: float) -> Tensor:
    """W [d, C] of equation 3."""
    matrix = view.gram + l1 * _eye(view.gram)
    for m, pair in pairs.items():
        shared = projections[m].T @ pair.zx
        matrix = matrix + pair.strength * (pair.xx - shared.T @ shared)
    return _solve_positive(matrix, view.cross)


def _objective(
    view: Centred, pairs: Mapping[str, _Pair], projections: Tensors, weight: Tensor, settings: Settings
) -> float:
    """J of equation 1."""
    value = _residual(view, weight) + settings.l1 * float(weight.square().sum())
    for m, pair in pairs.items():
        outside = (weight * (pair.xx @ weight)).sum() - (projections[m].T @ pair.zx @ weight).square().sum()
        explained = (projections[m].T @ pair.zy).square().sum()
        value += pair.strength * float(outside - settings.eta * explained)
    return value


def _residual(view: Centred, weight: Tensor) -> float:
    """||XW - Y||^2."""
    return view.energy + float((weight * (view.gram @ weight - 2 * view.cross)).sum())


def _solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.cholesky_solve(right, _cholesky(matrix, "l1"))
    return solution


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _cholesky(matrix: Tensor, penalty: str) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ConfigError(
            f"{penalty} is too small for these features: rounding makes a matrix indefinite",
            where=f"arm.{penalty}",
            remedy="raise it, or bring the features to one scale",
        )
    return factor
