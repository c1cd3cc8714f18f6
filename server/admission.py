"""The admission check: every reply is looked at before it may touch the model.

A reply is refused with a reason; what follows (ask again, leave out, stop) is the policy's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message

from fedmm.models.blocks import is_float
from fedmm.types import Tensors
from fedmm.wire import Task, read_reply
from server.aggregation import Update, update_norm


@dataclass(frozen=True)
class Refusal:
    """Why a reply was not admitted. `kind` is a short stable word, `reason` says it in full."""

    client: int
    kind: str
    reason: str


def admit(
    message: Message,
    task: Task,
    expected: Mapping[str, torch.Tensor],
    owned: tuple[str, ...],
    max_norm: float | None,
) -> Update | Refusal:
    """Check one reply to a train message.

    Args:
        message: The reply.
        task: What the client was asked.
        expected: Names -> tensors of the global model that the client must return, no more and no less.
        owned: Modalities that the client owns.
        max_norm: Largest admitted L2 norm of the update, or None.

    Returns:
        The update, or the reason for refusing it: error, malformed, stale, identity, samples, blocks, shape, dtype,
        finite, norm.
    """

    def refuse(kind: str, reason: str) -> Refusal:
        return Refusal(task.client, kind, reason)

    parsed = parse(message, task)
    if isinstance(parsed, Refusal):
        return parsed
    header, report, model = parsed
    if not isinstance(header.samples, int) or header.samples <= 0:
        return refuse("samples", f"the update rests on {header.samples} samples")
    if missing := sorted(set(expected) - set(model)):
        return refuse("blocks", f"{len(missing)} tensors are missing, the first is {missing[0]}")
    if extra := sorted(set(model) - set(expected)):
        return refuse("blocks", f"{len(extra)} tensors were not asked for, the first is {extra[0]}")
    for name, tensor in model.items():
        if tensor.shape != expected[name].shape:
            return refuse("shape", f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}")
        if tensor.dtype != expected[name].dtype:
            return refuse("dtype", f"{name} is {tensor.dtype}, not {expected[name].dtype}")
    for name, tensor in [*model.items(), *report.items()]:
        if is_float(tensor) and not bool(torch.isfinite(tensor).all()):
            return refuse("finite", f"{name} has values that are not finite")
    if max_norm is not None and (norm := update_norm(model, expected)) > max_norm:
        return refuse("norm", f"the update's norm {norm:.4g} exceeds {max_norm:.4g}")
    complete = set(task.modalities) == set(owned)
    return Update(task.client, header.samples, task.modalities, model, report, header.loss, complete)


def parse(message: Message, task: Task) -> tuple[Any, Tensors, Tensors] | Refusal:
    """Read any reply and check that it answers this task, from this client, in this round."""
    if message.has_error():
        return Refusal(task.client, "error", message.error.reason or f"error code {message.error.code}")
    try:
        header, report, model = read_reply(message)
    except (KeyError, ValueError, TypeError, EOFError) as error:
        return Refusal(task.client, "malformed", f"the reply cannot be read: {error!r}")
    if header.round != task.round:
        return Refusal(task.client, "stale", f"the reply is of round {header.round}, not {task.round}")
    if header.client != task.client:
        return Refusal(task.client, "identity", f"the reply claims to come from client {header.client}")
    return header, report, model
