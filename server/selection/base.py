"""The contract of selection: which clients train, and which of their modalities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from server.facts import Federates, Knowledge

Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pick:
    """One client, and the modalities that it shall train."""

    client: int
    modalities: tuple[str, ...]


def _nobody(clients: Sequence[int]) -> Mapping[int, Mapping[str, float]]:
    """Where there is nobody to ask."""
    return {}


@dataclass(frozen=True)
class Situation:
    """What a selector sees in a round.

    Attributes:
        round: From 1.
        candidates: Clients that may be picked, sorted.
        federates: Modalities, owners, sample counts.
        knowledge: The kinds of knowledge that the selector asked for.
        losses: Asks clients for the global model's mean loss on their training data (costs messages).
        own_losses: Asks clients likewise for the mean loss of each of their modalities alone (costs messages).
    """

    round: int
    candidates: tuple[int, ...]
    federates: Federates
    knowledge: Mapping[str, Knowledge]
    losses: Callable[[Sequence[int]], Mapping[int, float]]
    own_losses: Callable[[Sequence[int]], Mapping[int, Mapping[str, float]]] = _nobody

    def everything(self, client: int) -> Pick:
        """The client with all modalities that it owns."""
        return Pick(client, self.federates.owned[client])


@dataclass(frozen=True)
class Selector:
    """Base of all selectors: subclasses are frozen dataclasses whose fields are the parameters.

    Class attributes:
        needs: Knowledge to decide by.
        least_modalities: Fewest modalities for which the selector means anything.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    least_modalities: ClassVar[int] = 1

    def knowledge(self) -> frozenset[str]:
        """Knowledge wanted with these parameters."""
        return self.needs

    def picks(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """What `select` picks, in an order that means nothing."""
        if len(situation.candidates) <= count and self.takes_all(situation):
            return [situation.everything(k) for k in situation.candidates]
        return self.select(situation, count, rng)

    def takes_all(self, situation: Situation) -> bool:
        """Whether candidates that are no more than needed are sure to train all that they own."""
        return False

    def select(self, situation: Situation, count: int, rng: np.random.Generator) -> list[Pick]:
        """Pick `count` different candidates (all, if there are fewer).

        Args:
            situation: What is known in this round.
            count: m, how many clients to pick.
            rng: The round's own stream; the only source of randomness.
        """
        raise TypeError(f"{type(self).__name__} selects nothing")

    def metrics(self, situation: Situation, count: int) -> dict[tuple[str, str], float]:
        """(modality or "fused", metric) -> value: how `select` decides in this situation, for the round's record."""
        return {}


def draw(rng: np.random.Generator, pool: Indices, size: int) -> Indices:
    """`size` different elements of `pool`, uniformly (all of it, in order, if it is no larger)."""
    return pool if size >= len(pool) else pool[rng.choice(len(pool), size=size, replace=False)]
