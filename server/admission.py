"""The admission check: every reply is looked at before it may touch the model.

A reply is refused with a reason; what follows (ask again, leave out, stop) is the policy's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import Message

from fedmm.metrics.fields import Fields, fault
from fedmm.models.blocks import block_of, is_float
from fedmm.models.width import Shapes
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, read_reply
from server.aggregation import Update, update_norm


@dataclass(frozen=True)
class Refusal:
    """Why a reply was not admitted. `kind` is a short stable word, `reason` says it in full."""

    client: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Expected:
    """What a good reply to a train message holds.

    Attributes:
        model: Names -> tensors of the global model that the client must return, no more and no less.
        report: Fields of the report, likewise.
        owned: Modalities that the client owns.
        max_norm: Largest admitted L2 norm of the update, or None.
        optional: Blocks of `model` that may be left out, as a whole.
        held: Shapes of those of `model` that are a part of the global model's.
    """

    model: Mapping[str, torch.Tensor]
    report: Fields
    owned: tuple[str, ...]
    max_norm: float | None = None
    optional: frozenset[str] = frozenset()
    held: Shapes = field(default_factory=dict)


def admit(message: Message, task: Task, expected: Expected, samples: int) -> Update | Refusal:
    """Check one reply to a train message of a client that said it has `samples` training samples.

    Returns:
        The update, or the reason for refusing it: error, malformed, stale, identity, samples, blocks, shape, dtype,
        finite, report, norm.
    """
    parsed = parse(message, task)
    return parsed if isinstance(parsed, Refusal) else admit_parts(*parsed, task, expected, samples)


def admit_parts(
    header: ReplyHeader, report: Tensors, model: Tensors, task: Task, expected: Expected, samples: int
) -> Update | Refusal:
    """`admit` for a reply that has been read, and whose header answers the task."""

    def refuse(kind: str, reason: str) -> Refusal:
        return Refusal(task.client, kind, reason)

    if not isinstance(header.samples, int) or not 0 < header.samples <= samples:
        return refuse("samples", f"the update rests on {header.samples} samples, the client has {samples}")
    skipped = expected.optional - {block_of(n) for n in set(model) & set(expected.model)}
    if missing := sorted(n for n in set(expected.model) - set(model) if block_of(n) not in skipped):
        return refuse("blocks", f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(set(model) - set(expected.model)):
        return refuse("blocks", f"{len(extra)} tensors were not asked for, the first is {extra[0]}")
    for name, tensor in sorted(model.items()):
        if tensor.shape != expected.model[name].shape:
            return refuse("shape", f"{name} is {list(tensor.shape)}, not {list(expected.model[name].shape)}")
        if tensor.dtype != expected.model[name].dtype:
            return refuse("dtype", f"{name} is {tensor.dtype}, not {expected.model[name].dtype}")
    for name, tensor in sorted(model.items()):
        if is_float(tensor) and not bool(torch.isfinite(tensor).all()):
            return refuse("finite", f"{name} has values that are not finite: its training diverged? (lower train.lr)")
    if reason := fault(report, expected.report):
        return refuse("report", reason)
    if expected.max_norm is not None and (norm := update_norm(model, expected.model)) > expected.max_norm:
        return refuse("norm", f"the update's norm {norm:.4g} exceeds {expected.max_norm:.4g}")
    complete = set(task.modalities) == set(expected.owned)
    return Update(
        task.client,
        header.samples,
        task.modalities,
        model,
        report,
        header.loss,
        complete,
        header.steps,
        held=expected.held,
    )


def parse(message: Message, task: Task) -> tuple[ReplyHeader, Tensors, Tensors] | Refusal:
    """Read any reply and check that it answers this task, from this client, in this round."""
    if message.has_error():
        return Refusal(task.client, "error", message.error.reason or f"error code {message.error.code}")
    try:
        header, report, model = read_reply(message)
    except (KeyError, ValueError, TypeError, EOFError) as error:
        return Refusal(task.client, "malformed", f"the reply cannot be read: {error!r}")
    return check_header(header, task) or (header, report, model)


def check_header(header: ReplyHeader, task: Task) -> Refusal | None:
    """Why a reply does not answer a task, if it does not."""
    if header.round != task.round:
        return Refusal(task.client, "stale", f"the reply is of round {header.round}, not {task.round}")
    if header.client != task.client:
        return Refusal(task.client, "identity", f"the reply claims to come from client {header.client}")
    return None
