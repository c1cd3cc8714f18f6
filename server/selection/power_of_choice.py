"""Power-of-choice (Cho, Wang and Joshi, AISTATS 2022): of d candidates, the m with the largest local loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import PositiveInt

from server.selection.base import Pick, Selector, Situation


@dataclass(frozen=True)
class PowerOfChoice(Selector):
    """Draw d candidates in proportion to n_k, ask for the global model's loss, keep the m largest.

    Attributes:
        d: Candidates a round; null: twice the number to pick.
        proportional: Draw in proportion to n_k (the paper), or uniformly.
    """

    d: PositiveInt | None = None
    proportional: bool = True

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`."""
        if not situation.candidates:
            return []
        pool = np.array(situation.candidates)
        size = min(len(pool), max(count, self.d or 2 * count))
        n = np.array([situation.federates.samples[k] for k in pool], dtype=float)
        p = n / n.sum() if self.proportional and np.count_nonzero(n) >= size else None
        drawn = sorted(int(k) for k in rng.choice(pool, size=size, replace=False, p=p))
        losses = situation.losses(drawn)
        # A candidate that did not answer is worth asking to train only if nobody else is left.
        best = sorted(drawn, key=lambda k: (-losses.get(k, float("-inf")), k))[:count]
        return [situation.everything(k) for k in sorted(best)]
