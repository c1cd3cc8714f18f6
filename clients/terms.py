"""What a client's own terms (`fedmm.wire.Terms`) change in its training: schedule and number format.

A device that trains in bfloat16 rounds the model, the broadcast and its samples to bfloat16, and keeps weights,
gradients and momentum in it: two bytes a number, as `fedmm.engines.costs.training_memory` counts. What it sends back
is cast to the server's format again, so that messages and their bytes do not depend on it.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from clients.trainer import LocalSchedule
from clients.workspace import Workspace, workspace
from fedmm.config.schema import TrainConfig
from fedmm.models.blocks import is_float
from fedmm.types import Tensors
from fedmm.wire import Terms


def local_schedule(train: TrainConfig, epochs: int, lr: float, terms: Terms) -> LocalSchedule:
    """A client's schedule: the run's, with the client's own epochs and batch size where it has them.

    Args:
        train: The run's settings.
        epochs: Local epochs of who has no terms.
        lr: Local learning rate of the round.
        terms: The client's own.
    """
    return LocalSchedule(
        terms.epochs or epochs,
        terms.batch_size or train.batch_size,
        lr,
        train.momentum,
        train.weight_decay,
        train.clip,
    )


def workspace_in(precision: str | None, spec: str, root: str | None, home: str | None = None) -> Workspace:
    """The process's workspace of a specification in a device's number format; None: in the run's."""
    return workspace(spec, root, home) if precision is None else _bfloat16(spec, root, home)


@lru_cache(maxsize=2)
def _bfloat16(spec: str, root: str | None, home: str | None) -> Workspace:
    here = Workspace(spec, root, home)
    here.dtype = torch.bfloat16
    here.model.to(here.dtype)
    return here


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The floating-point tensors in another number format, the others as they are."""
    return {n: t.to(dtype) if is_float(t) else t for n, t in tensors.items()}
