"""Uniform selection without replacement: FedAvg's.

Clients are drawn one after another, so that submodular selection with one random candidate a step draws the very
same clients from the same stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.selection.base import Pick, Selector, Situation


@dataclass(frozen=True)
class Uniform(Selector):
    """m clients uniformly without replacement, each with all its modalities."""

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        pool, picks = list(situation.candidates), []
        # The numbers that `draw` would give one by one.
        for index in rng.integers(np.arange(len(pool), max(0, len(pool) - count), -1)).tolist():
            picks.append(situation.everything(pool.pop(index)))
        return picks
