"""What a server asks of a process that holds many clients, instead of one message a client.

Engines that run in one machine carry these; a federation of devices gets Flower messages (`fedmm.wire`). Both mean
the same, and give the same weights. Arrays are NumPy's: they cross process borders without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Terms

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Shared:
    """What all jobs of a round have in common; it reaches each process once.

    Attributes:
        spec: The client's part of the configuration (`fedmm.spec.client_spec`).
        home: Folder where the data have been laid out for all processes (`clients.workspace.lay_out`), if they have.
        model: Global model.
        broadcast: Server knowledge, with "round".
    """

    spec: str
    home: str | None = None
    model: Arrays = field(default_factory=dict)
    broadcast: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Hello:
    """Ask who the clients are: owned modalities and class counts."""


@dataclass(frozen=True)
class Train:
    """Train the clients at some places of a round's order.

    Attributes:
        round: Round from 1; 0 is the bootstrap.
        attempt: 0 for the first time that these clients are asked in the round.
        run: The aligned run of places that the job covers: first, length (a power of two).
        places: Place of each client, ascending.
        clients: Partition indices.
        modalities: Modalities that each client trains.
        weights: Factor of each client's model in the sums.
        epochs: Local epochs.
        lr: Local learning rate.
        requests: Statistics wanted.
        deltas: Prefix of the tensors whose change (sent less trained) is wanted; None: of none.
        cohort: Clients in a stack, a power of two; 1: one by one.
        leaf: Places of a leaf of the tree of sums (`fedmm.trees`).
        each: Give back each client's model instead of sums.
        terms: Of each client; empty: nobody has terms of its own.
        personal: What each client is sent for itself (`fedmm.personal`); empty: nothing.
        company: The job that this one is a part of. Clients are computed as they would be in their stack there, whose
            shape their last bits can depend on.
    """

    round: int
    attempt: int
    run: tuple[int, int]
    places: tuple[int, ...]
    clients: tuple[int, ...]
    modalities: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]
    epochs: int
    lr: float
    requests: tuple[str, ...] = ()
    deltas: str | None = None
    cohort: int = 16
    leaf: int = 1
    each: bool = False
    terms: tuple[Terms, ...] = ()
    personal: tuple[Arrays, ...] = ()
    company: Train | None = None

    def split(self) -> list[Train]:
        """The same work as jobs of one client each, which give models: others are in the same leaf of the tree."""
        whole = replace(self.company or self, personal=())
        return [
            replace(
                self,
                run=(place, 1),
                places=(place,),
                clients=self.clients[i : i + 1],
                modalities=self.modalities[i : i + 1],
                weights=self.weights[i : i + 1],
                each=True,
                terms=self.terms[i : i + 1],
                personal=self.personal[i : i + 1],
                company=whole,
            )
            for i, place in enumerate(self.places)
        ]


@dataclass(frozen=True)
class Group:
    """Clients that trained together; entry i belongs to place `places[i]`.

    Attributes:
        places: Their places.
        loss: Mean loss of the last epoch, float64 [g].
        steps: Optimiser steps, int64 [g].
        report: Statistics and the objective's report, [g, ...] each.
        deltas: Tensor name -> sent less trained, float32 [g, *shape], matrices `turned`.
        blocks: Blocks that they trained.
    """

    places: tuple[int, ...]
    loss: npt.NDArray[np.float64]
    steps: npt.NDArray[np.int64]
    report: Arrays
    deltas: Arrays
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Single:
    """One client's own reply, or the error that it ended in."""

    place: int
    header: ReplyHeader | None
    report: Arrays = field(default_factory=dict)
    model: Arrays = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Trained:
    """What a `Train` job gives: sums with groups, or single replies.

    Attributes:
        sums: Tensor name -> sum of weight x tensor over the job's run of the tree, float64, plain layout.
        groups: Who trained together.
        singles: Each client's reply, if they were wanted or if something was wrong with one.
        training: Seconds in forward, backward and update.
    """

    sums: Arrays = field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    singles: tuple[Single, ...] = ()
    training: float = 0.0


@dataclass(frozen=True)
class Measure:
    """Measure the model on one split of some clients.

    Attributes:
        split: "train", "val" or "test".
        clients: Partition indices, ascending.
        request: A statistic (`fedmm.metrics.local.STATISTICS`), or None for an evaluation.
    """

    split: str
    clients: tuple[int, ...]
    request: str | None = None


@dataclass(frozen=True)
class Measured:
    """Sums over the clients of a job, and the sum of losses of each (evaluations only), float64."""

    sums: Arrays
    losses: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Observe:
    """Have each of some clients observe the model; the result is one report a client, in their order.

    Attributes:
        split: "train" or "val".
        clients: Partition indices, ascending.
        what: Kinds of observation (`fedmm.metrics.imbalance.OBSERVATIONS`).
    """

    split: str
    clients: tuple[int, ...]
    what: tuple[str, ...]


Job = Hello | Train | Measure | Observe
Work = Callable[[Any, Shared], Any]
"""(job, shared) -> result, whatever process it is called in."""


def turned(tensors: torch.Tensor) -> torch.Tensor:
    """Tensors [g, *shape] with matrices transposed, as stacks hold them; and back."""
    return tensors.mT if tensors.dim() == 3 else tensors


def arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """Tensors as arrays of the same memory."""
    return {n: t.detach().cpu().contiguous().numpy() for n, t in tensors.items()}


def tensors(found: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """Arrays as tensors; read-only ones, as another process's are, are copied."""
    return {n: torch.from_numpy(a if a.flags.writeable else a.copy()) for n, a in found.items()}
