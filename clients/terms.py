"""What a client's own terms (`fedmm.wire.Terms`) change in its training: schedule, number format and width.

A device that trains in bfloat16 rounds the model, the broadcast and its samples to bfloat16, and keeps weights,
gradients and momentum in it: two bytes a number, as `fedmm.engines.costs.training_memory` counts. What it sends back
is cast to the server's format again, so that messages and their bytes do not depend on it. A device of part of the
model's width is sent, trains and sends back the leading corner of each tensor (`fedmm.models.width`).
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from clients.trainer import LocalSchedule
from clients.workspace import Workspace, workspace
from fedmm.config.schema import TrainConfig
from fedmm.models.blocks import is_float
from fedmm.models.width import corner, shapes_of
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


def workspace_on(terms: Terms, spec: str, root: str | None, home: str | None = None) -> Workspace:
    """The process's workspace of a specification, in the number format and width of a device."""
    if terms.precision is None and terms.width is None:
        return workspace(spec, root, home)
    return _own_workspace(terms.precision, terms.width, spec, root, home)


@lru_cache(maxsize=8)
def _own_workspace(
    precision: str | None, width: int | None, spec: str, root: str | None, home: str | None
) -> Workspace:
    if width is not None:
        raw = json.loads(spec)
        raw["model"]["width"] = width
        spec = json.dumps(raw, sort_keys=True)
    here = Workspace(spec, root, home)
    if precision is not None:
        here.use(torch.bfloat16)
    return here


def fitted(tensors: Tensors, here: Workspace) -> Tensors:
    """The part of a whole model, or of copies of it (names "model.<name>"), that a narrow device holds."""
    shapes = shapes_of(here.model)
    return corner(tensors, shapes | {f"model.{n}": shape for n, shape in shapes.items()})


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The floating-point tensors in another number format, the others as they are."""
    return {n: t.to(dtype) if is_float(t) else t for n, t in tensors.items()}
