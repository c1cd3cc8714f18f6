"""MFedMC's choice of clients (Yuan et al., arXiv 2401.16685): of each modality those with the lowest local loss.

    l_{k,m} = mean CE(o^m, y) of the received model on the training samples of client k that have m
    of each modality the r clients with the smallest l_{k,m}; r as small as gives `count` clients in all

The paper has a fraction delta of all clients send what they trained: here delta is what `train.clients_per_round` and
`candidates` make it. It compares losses after the local training of everybody, most of whose work is then thrown away;
here candidates are asked before anybody trains, as in power-of-choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pydantic import PositiveInt

from server.selection.base import Pick, Selector, Situation


@dataclass(frozen=True)
class LowestLoss(Selector):
    """Ask candidates for the loss of each of their modalities, and take turns among the modalities.

    Attributes:
        candidates: Clients that are asked, drawn uniformly; null: all that may take part.
    """

    candidates: PositiveInt | None = None

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """See `Selector.select`; of clients with the same rank the first modality's come first."""
        drawn = list(situation.candidates)
        if self.candidates is not None and len(drawn) > max(count, self.candidates):
            size = max(count, self.candidates)
            drawn = sorted(int(k) for k in rng.choice(drawn, size=size, replace=False))
        if len(drawn) <= count:
            return [situation.everything(k) for k in drawn]
        losses = situation.own_losses(drawn)

        def loss(client: int, modality: str) -> float:
            # A candidate that did not answer is worth asking to train only if nobody else is left.
            return losses.get(client, {}).get(modality, math.inf)

        owned = situation.federates.owned
        ranked = [
            sorted((k for k in drawn if m in owned[k]), key=lambda k: (loss(k, m), k))
            for m in situation.federates.modalities
        ]
        turns = [column[rank] for rank in range(len(drawn)) for column in ranked if rank < len(column)]
        return [situation.everything(k) for k in sorted(list(dict.fromkeys(turns))[:count])]
