"""The contract of a server method: what is aggregated how, and the state that this takes.

A strategy never sees an engine or a message: the loop hands it admitted updates, sorted by client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedmm.types import Tensors
from server.aggregation import Update, blockwise_mean
from server.knowledge import Federates


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies: subclasses are frozen dataclasses whose fields are the parameters.

    The state is one dictionary of named tensors, handed in and out, so that it can be checkpointed.

    Class attributes:
        needs: Knowledge that the strategy works with besides objective and selector.
        reads_models: `aggregate` looks at single models. Without it, it may only take `blockwise_mean` of the updates
            with `weight`, and workers add the models up where they arise.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_models: ClassVar[bool] = True

    def weight(self, samples: int, steps: int) -> float:
        """Factor of a client's model in the sum, from its samples and optimiser steps; n_k by default."""
        return float(samples)

    def begin(self, model: Tensors, federates: Federates) -> Tensors:
        """State before the first round."""
        return {}

    def broadcast(self, state: Tensors) -> Tensors:
        """What clients get besides the model and the knowledge that their objective wants."""
        return {}

    def aggregate(
        self, model: Tensors, updates: Sequence[Update], state: Tensors, min_owners: int
    ) -> tuple[Tensors, Tensors]:
        """The next global model and state.

        Args:
            model: The model that the updates started from.
            updates: Admitted updates, sorted by client; never empty.
            state: This strategy's state.
            min_owners: Fewest clients that must have trained a modality's block before it moves.
        """
        raise TypeError(f"{type(self).__name__} aggregates nothing")


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Block-wise mean weighted by samples (McMahan et al., 2017), each block over those who trained it."""

    reads_models: ClassVar[bool] = False

    def aggregate(
        self, model: Tensors, updates: Sequence[Update], state: Tensors, min_owners: int
    ) -> tuple[Tensors, Tensors]:
        """w_b = sum_k n_k w_{k,b} / sum_k n_k over the clients that trained block b."""
        return blockwise_mean(model, updates, min_owners=min_owners), state
