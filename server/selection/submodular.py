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

Up to 10,000 clients these sums are exact. Above, `route: auto` estimates them (`route` fixes either way):

    candidates: max(4 m, 20,000) random ones; each greedy step looks at the same share of them as the method says
    demand k:   max(25 m, 10,000) random clients instead of V
    distances:  between fresh sketches of 64 numbers, computed as needed, never stored

What that costs, on synthetic clusters (`python -m experiments.bench.selection`; one core, cost relative to plain
exact greedy and to random clients):

    exact      1,000 of 10,000    plain 0.5 s, stochastic 0.4 s + 0.5 %;   0.82 of random
    sampled      200 of 2,000     everybody is a candidate and in demand, sketches alone: + 1.2 %
                  20 of 2,000     likewise + 2.0 %; a tenth as candidates and a quarter as demand: + 4.8 %
               1,000 of 100,000   DivFL 6.3 s, CMSFed 12.8 s, 0.44 GB in all;   0.88 and 0.80 of random

`metrics` says which route was taken. The sampled route repeats to the bit on one machine and number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import NonNegativeFloat, PositiveInt

from server.directions import STORED, Directions, Matrix, sketch, unit
from server.knowledge import Imbalance
from server.selection.base import Indices, Pick, Selector, Situation, draw
from server.selection.facility import Computed, Cover, greedy

WIDTH = 64
"""Numbers of a vector's sketch in the sampled route: distances with a standard error of about 9 %."""

SITES = 4
"""Candidates for each client to pick in the sampled route, and no fewer than `FEWEST_SITES`."""

FEWEST_SITES = 20_000

DEMAND = 25
"""Demand points for each client to pick in the sampled route, and no fewer than `FEWEST_DEMAND`.

With few of them the picks would fit the sample instead of everybody.
"""

FEWEST_DEMAND = 10_000


@dataclass(frozen=True)
class Field:
    """Who may be picked, and whom the picks shall be near.

    Attributes:
        sites: Clients that covers know, [n]; their positions here stand for them in pools and covers.
        pool: Positions of those that may be picked.
        demand: Clients that the picks shall be near; None: all, exactly.
        seed: Of the sketches.
    """

    sites: Indices
    pool: Indices
    demand: Indices | None = None
    seed: int = 0

    def cover(self, known: Directions, key: str, normalise: bool) -> Cover:
        """An empty cover over one kind of vectors."""
        vectors = known.vectors(key)
        if self.demand is not None:
            return Cover(Computed(*(self._sketched(vectors[k], normalise) for k in (self.sites, self.demand))))
        if len(vectors) <= STORED:
            return Cover(known.distances(key, normalise))
        every = (unit(vectors) if normalise else vectors).numpy()
        return Cover(Computed(every, every))

    def _sketched(self, vectors: torch.Tensor, normalise: bool) -> Matrix:
        result: Matrix = sketch(unit(vectors) if normalise else vectors, WIDTH, self.seed).numpy()
        return result


@dataclass(frozen=True)
class _Greedy(Selector):
    """Shared parameters of greedy facility location.

    Attributes:
        greedy: "stochastic" looks at a random subset in each step, "plain" at all candidates.
        candidates: Size of that subset; null: max(m, K / 10).
        normalize_delta: Unit-length directions before distances (off in the paper).
        route: "exact" sums over all clients, "sampled" estimates them; "auto": exact up to 10,000 clients.
    """

    greedy: Literal["stochastic", "plain"] = "stochastic"
    candidates: PositiveInt | None = None
    normalize_delta: bool = False
    route: Literal["auto", "exact", "sampled"] = "auto"

    def sampled(self, clients: int) -> bool:
        """Whether sums over this many clients are estimated."""
        return self.route == "sampled" or (self.route == "auto" and clients > STORED)

    def metrics(self, situation: Situation, count: int) -> dict[tuple[str, str], float]:
        """The route (1: sampled), and how many clients may be picked and are to be near."""
        sites, demand = self._sizes(situation, count)
        return {
            ("fused", "selection_sampled"): float(self.sampled(len(situation.federates.owned))),
            ("fused", "selection_candidates"): float(sites),
            ("fused", "selection_demand"): float(demand),
        }

    def _sizes(self, situation: Situation, count: int) -> tuple[int, int]:
        clients, pool = len(situation.federates.owned), len(situation.candidates)
        if not self.sampled(clients):
            return pool, clients
        sites = pool if self.greedy == "plain" else min(pool, max(SITES * count, FEWEST_SITES))
        return sites, min(clients, max(DEMAND * count, FEWEST_DEMAND))

    def _step(self, situation: Situation, count: int) -> int | None:
        """How many random sites a greedy step looks at; None: all."""
        if self.greedy == "plain":
            return None
        size = self.candidates or max(count, len(situation.federates.owned) // 10)
        sites, _ = self._sizes(situation, count)
        # The same share: a step that saw every site would offer CMSFed the same weak candidate again and again.
        return max(1, size * sites // max(1, len(situation.candidates)))

    def _field(self, situation: Situation, count: int, rng: np.random.Generator) -> Field:
        clients, pool = len(situation.federates.owned), np.array(situation.candidates, dtype=np.int64)
        if not self.sampled(clients):
            return Field(np.arange(clients), pool)
        sites, demand = self._sizes(situation, count)
        # Sorted: memory is read in order, and a tie goes to the first client.
        chosen = np.sort(draw(rng, pool, sites))
        near = np.sort(draw(rng, np.arange(clients), demand))
        return Field(chosen, np.arange(len(chosen)), near, int(rng.integers(2**63)))


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

    def takes_all(self, situation: Situation) -> bool:
        """See `Selector.takes_all`."""
        return True

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        kind, key = ("directions", "joint") if self.vectors == "encoders" else ("whole_directions", "whole")
        field = self._field(situation, count, rng)
        cover = field.cover(cast(Directions, situation.knowledge[kind]), key, self.normalize_delta)
        picked = greedy(cover, field.pool, count, self._step(situation, count), rng)
        return [situation.everything(int(field.sites[i])) for i in picked]


@dataclass(frozen=True)
class CMSFed(_Greedy):
    """Clients and modalities by two facility-location functions (BMSFed's balanced modality selection).

    Attributes:
        theta: Imbalance above which a client trains its weak modality only; infinity: never.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"directions", "imbalance"})
    least_modalities: ClassVar[int] = 2
    theta: NonNegativeFloat = 1.5

    def takes_all(self, situation: Situation) -> bool:
        """If nobody's imbalance is above theta."""
        weak, lags = self._lagging(situation)
        owned = situation.federates.owned
        return not any(lags[k] and weak in owned[k] for k in situation.candidates)

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        directions = cast(Directions, situation.knowledge["directions"])
        weak, lagging = self._lagging(situation)
        field, size = self._field(situation, count, rng), self._step(situation, count)
        owners = np.array([weak in situation.federates.owned[k] for k in field.sites], dtype=bool)
        lags = lagging[field.sites]
        cover_weak: Cover | None = None
        cover_all: Cover | None = None
        pool, picks = field.pool, list[Pick]()
        while len(picks) < count and len(pool):
            step = pool if size is None else draw(rng, pool, size)
            for_weak, site = step[owners[step]], -1
            # Where no owner is above theta, the weak candidate is not picked, whoever it is.
            if lags[for_weak].any():
                cover_weak = cover_weak or field.cover(directions, f"encoder.{weak}", self.normalize_delta)
                site = cover_weak.best(for_weak)
            if cover_weak is not None and site >= 0 and lags[site]:
                cover_weak.add(site)
                picks.append(Pick(int(field.sites[site]), (weak,)))
            else:
                cover_all = cover_all or field.cover(directions, "joint", self.normalize_delta)
                site = cover_all.best(step)
                cover_all.add(site)
                picks.append(situation.everything(int(field.sites[site])))
            pool = pool[pool != site]
        return picks

    def _lagging(self, situation: Situation) -> tuple[str, npt.NDArray[np.bool_]]:
        """The weak modality, and which clients have an imbalance above theta."""
        imbalance = cast(Imbalance, situation.knowledge["imbalance"])
        dominant, weak = imbalance.order()
        return situation.federates.modalities[weak], imbalance.local_ratios(dominant, weak) > self.theta
