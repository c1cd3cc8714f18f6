"""Facility location: pick sites S, |S| = m, so that every demand point is near one of them.

    G(S) = sum_{k in demand} min_{i in S} D[k, i]  ->  min

G({first pick}) - G(S) is monotone and submodular, so that the greedy choice is within 1 - 1/e of the best (Nemhauser,
Wolsey and Fisher 1978), and what adding a site gains only shrinks as S grows: a gain computed earlier bounds today's
(Minoux 1978). `Cover` keeps these bounds and looks at the few sites whose bound reaches the best gain found, among
all sites or a random subset of them (stochastic greedy, Mirzasoleiman et al., AAAI 2015). Its picks are those of
comparing everybody.

Exactly 1,000 of 10,000 sites take half a second of one core, with the matrix (400 MB in float32) and no copy of it.

Distances come from a matrix (`Stored`) or are computed from vectors as they are needed (`Computed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from server.directions import Matrix
from server.selection.base import Indices, draw

TIE = 1e-12
"""Relative difference of sums below which they count as equal."""

_BLOCK = 2**19  # distances that are looked at together: small enough for a core's cache
_FIRST = 8  # sites looked at first; each further look of a step takes twice as many


class Distances(Protocol):
    """Distances from sites to demand points."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of sites and of demand points."""
        ...

    def rows(self, sites: Indices) -> Matrix:
        """Distances of some sites to all demand points, [len(sites), demand], in an array of its own."""
        ...


class Stored:
    """Distances of a symmetric matrix [K, K]: everybody is a site and a demand point. Never written to."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self.shape: tuple[int, int] = (len(matrix), len(matrix))

    def rows(self, sites: Indices) -> Matrix:
        """See `Distances`."""
        return self._matrix[sites]


class Computed:
    """Euclidean distances between vectors, computed in float32 when asked for; memory O((n + N) d).

    By the Gram form, which is off by up to about 1e-3 of the vectors' length (their mean taken off) where two are
    nearly equal.

    Args:
        sites: Vectors [n, d].
        demand: Vectors [N, d].
    """

    def __init__(self, sites: Matrix, demand: Matrix) -> None:
        centre = demand.mean(0, dtype=np.float64)
        a, b = (sites - centre).astype(np.float32), (demand - centre).astype(np.float32)
        self.shape: tuple[int, int] = (len(a), len(b))
        # |a|^2 + |b|^2 - 2ab as one product: [a, |a|^2, 1] times [-2b, 1, |b|^2].
        self._sites = np.column_stack([a, np.square(a).sum(1), np.ones(len(a), np.float32)])
        self._demand = np.ascontiguousarray(
            np.column_stack([-2 * b, np.ones(len(b), np.float32), np.square(b).sum(1)]).T
        )

    def rows(self, sites: Indices) -> Matrix:
        """See `Distances`."""
        squares: Matrix = self._sites[sites] @ self._demand
        np.maximum(squares, 0, out=squares)
        result: Matrix = np.sqrt(squares, out=squares)
        return result


class Cover:
    """sum_k min_{i in S} D[k, i] while S grows.

    Args:
        distances: Where distances come from; a symmetric matrix D [K, K] stands for `Stored`.

    Attributes:
        nearest: min_{i in S} D[k, i] of every demand point k; infinite while S is empty.
        evaluated: Sums that were computed so far.
    """

    def __init__(self, distances: Distances | npt.NDArray[np.floating[Any]]) -> None:
        self._distances = Stored(distances) if isinstance(distances, np.ndarray) else distances
        sites, demand = self._distances.shape
        # Single precision until the first site brings its own: infinity needs no digits.
        self.nearest: Matrix = np.full(demand, np.inf, np.float32)
        self.evaluated = 0
        self._cost, self._size = np.inf, 0
        # Of each site: G(S + j) when last computed, the size of S then, and so the most that j can gain now.
        self._costs, self._when, self._gains = np.empty(sites), np.full(sites, -1), np.full(sites, np.inf)

    def best(self, candidates: Sequence[int] | Indices) -> int:
        """The candidate whose addition leaves the smallest sum; the first in order on a tie.

        Two clients that are each other's nearest tie exactly, but for rounding: it must not decide.
        """
        pool = np.asarray(candidates, dtype=np.int64)
        gains, costs = self._gains[pool], np.full(len(pool), np.inf)
        if np.isfinite(self._cost) and self._cost <= (self._cost - gains.max()) * (1 + TIE):
            return int(pool[0])  # Nobody makes a difference: all tie.
        fresh = self._when[pool] == self._size
        costs[fresh], gains[fresh] = self._costs[pool[fresh]], -np.inf
        look, least = _FIRST, costs.min()
        while len(worth := np.flatnonzero(gains >= self._least_gain(least))):
            if len(worth) > look:
                worth = worth[np.argpartition(gains[worth], -look)[-look:]]
            costs[worth] = self._evaluate(pool[worth])
            gains[worth] = -np.inf
            least = costs.min()
            look *= 2
        return int(pool[(costs <= least * (1 + TIE)).argmax()])

    def _least_gain(self, least: float) -> float:
        """What a bound must reach to be worth a look, when the smallest sum found is this."""
        # A little less than the best gain: bounds are off by rounding, and every tie must be seen.
        return self._cost * (1 - 4 * TIE) - least if np.isfinite(least) else -self._cost

    def add(self, site: int) -> None:
        """Put a site into S."""
        self.nearest = np.minimum(self.nearest, self._distances.rows(np.array([site]))[0])
        self._cost = float(self.nearest.sum(dtype=np.float64))
        self._size += 1

    def _evaluate(self, sites: Indices) -> npt.NDArray[np.float64]:
        """G(S + j) of each of some sites j, kept with what it says of later gains."""
        self.evaluated += len(sites)
        costs, step = np.empty(len(sites)), max(1, _BLOCK // len(self.nearest))
        for start in range(0, len(sites), step):
            block = self._distances.rows(sites[start : start + step])
            np.minimum(block, self.nearest, out=block)
            costs[start : start + step] = block.sum(1, dtype=np.float64)
        self._costs[sites], self._gains[sites], self._when[sites] = costs, self._cost - costs, self._size
        return costs


def greedy(
    cover: Cover,
    pool: Sequence[int] | Indices,
    count: int,
    size: int | None = None,
    rng: np.random.Generator | None = None,
) -> list[int]:
    """Pick up to `count` sites greedily, in order, and put them into the cover.

    Args:
        cover: What is covered already.
        pool: Sites that may be picked.
        count: m.
        size: Stochastic greedy: look at this many random sites of the pool in each step.
        rng: For `size`.
    """
    left, picked = np.asarray(pool, dtype=np.int64), list[int]()
    while len(picked) < count and len(left):
        picked.append(cover.best(left if size is None or rng is None else draw(rng, left, size)))
        cover.add(picked[-1])
        left = left[left != picked[-1]]
    return picked


def total(distances: Distances, picked: Sequence[int]) -> float:
    """G(S) of a set of sites."""
    cover = Cover(distances)
    for site in picked:
        cover.add(site)
    return float(cover.nearest.sum(dtype=np.float64))
