"""Submodular selection: DivFL, and CMSFed / BMSFed with its decoupled functions and conflict resolution.

Facility location over update directions g_k: the picked set S shall be near everyone,

    G(S) = sum_{k in V} min_{i in S} || g_k - g_i ||_2                 DivFL (Balakrishnan et al., ICLR 2022)

CMSFed (arXiv 2401.00403) decouples the directions by modality and keeps two such functions,

    G_M(S_M) = sum_k min_{i in S_M} || g_k^M - g_i^M ||     clients to train with all their modalities
    G_W(S_W) = sum_k min_{j in S_W} || g_k^W - g_j^W ||     clients to train with the weak modality W only

and resolves the conflict at each greedy step by the imbalance of the weak candidate:

    R <- random candidates;  i_M, i_W <- best of R for G_M, G_W
    acc_dominant / acc_weak of i_W > theta:  pick i_W with W only, update cover_W
    else:                                    pick i_M with all its modalities, update cover_M
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt

from server.knowledge import Directions, Imbalance, Matrix
from server.selection.base import Pick, Selector, Situation, draw

_TIE = 1e-12
"""Relative difference of sums below which they count as equal."""


class Cover:
    """sum_k min_{i in S} D[k, i] while S grows; D is never written to.

    Args:
        matrix: Distances D [K, K].
    """

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self.nearest: npt.NDArray[np.float64] = np.full(len(matrix), np.inf)

    def best(self, candidates: Sequence[int]) -> int:
        """The candidate whose addition leaves the smallest sum; the first in order on a tie.

        Two clients that are each other's nearest tie exactly, but for rounding: it must not decide.
        """
        costs = np.minimum(self.nearest[:, None], self._matrix[:, candidates]).sum(0)
        return candidates[int((costs <= costs.min() * (1 + _TIE)).argmax())]

    def add(self, client: int) -> None:
        """Put a client into S."""
        self.nearest = np.minimum(self.nearest, self._matrix[:, client])


@dataclass(frozen=True)
class _Greedy(Selector):
    """Shared parameters of greedy facility location.

    Attributes:
        greedy: "stochastic" looks at a random subset in each step, "plain" at all candidates.
        candidates: Size of that subset; null: max(m, K / 10).
        normalize_delta: Unit-length directions before distances (off in the paper).
    """

    greedy: Literal["stochastic", "plain"] = "stochastic"
    candidates: int | None = None
    normalize_delta: bool = False

    def _step_pool(self, pool: Sequence[int], count: int, total: int, rng: np.random.Generator) -> list[int]:
        if self.greedy == "plain":
            return list(pool)
        return draw(rng, pool, self.candidates or max(count, total // 10))


@dataclass(frozen=True)
class DivFL(_Greedy):
    """Facility location over update directions of all blocks, all modalities of each picked client.

    Attributes:
        vectors: "whole": all blocks (DivFL's own); "encoders": encoder deltas, as CMSFed uses.
    """

    vectors: Literal["whole", "encoders"] = "whole"

    def knowledge(self) -> frozenset[str]:
        """Directions of the chosen kind."""
        return frozenset({"directions" if self.vectors == "encoders" else "whole_directions"})

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        kind, key = ("directions", "joint") if self.vectors == "encoders" else ("whole_directions", "whole")
        known = cast(Directions, situation.knowledge[kind])
        cover = Cover(known.distances(key, self.normalize_delta))
        pool, picks = list(situation.candidates), []
        for _ in range(min(count, len(pool))):
            client = cover.best(self._step_pool(pool, count, len(situation.federates.owned), rng))
            cover.add(client)
            pool.remove(client)
            picks.append(situation.everything(client))
        return picks


@dataclass(frozen=True)
class CMSFed(_Greedy):
    """Clients and modalities by two facility-location functions (BMSFed's balanced modality selection).

    Attributes:
        theta: Imbalance above which a client trains its weak modality only; infinity: never.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"directions", "imbalance"})
    least_modalities: ClassVar[int] = 2
    theta: float = 1.5

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        directions = cast(Directions, situation.knowledge["directions"])
        imbalance = cast(Imbalance, situation.knowledge["imbalance"])
        dominant, weak = imbalance.order()
        weak_name = situation.federates.modalities[weak]
        cover_all = Cover(directions.distances("joint", self.normalize_delta))
        cover_weak = Cover(directions.distances(f"encoder.{weak_name}", self.normalize_delta))
        owned = situation.federates.owned
        pool, picks = list(situation.candidates), []
        for _ in range(min(count, len(pool))):
            step = self._step_pool(pool, count, len(owned), rng)
            for_weak = [k for k in step if weak_name in owned[k]]
            candidate = cover_weak.best(for_weak) if for_weak else None
            if candidate is not None and imbalance.local_ratio(candidate, dominant, weak) > self.theta:
                client = candidate
                cover_weak.add(client)
                picks.append(Pick(client, (weak_name,)))
            else:
                client = cover_all.best(step)
                cover_all.add(client)
                picks.append(situation.everything(client))
            pool.remove(client)
        return picks
