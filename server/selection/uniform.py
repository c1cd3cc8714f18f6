"""Uniform selection without replacement: FedAvg's.

Clients are drawn one after another, so that submodular selection with one random candidate a step draws the very
same clients from the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.selection.base import Pick, Selector, Situation, draw


@dataclass(frozen=True)
class Uniform(Selector):
    """m clients uniformly without replacement, each with all its modalities."""

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        pool, picks = np.array(situation.candidates, dtype=np.int64), []
        for _ in range(min(count, len(pool))):
            client = int(draw(rng, pool, 1)[0])
            pool = pool[pool != client]
            picks.append(situation.everything(client))
        return picks
