"""Train one client for one round: flat, and the reference for everything that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmm import seeding
from fedmm.models.blocks import block_of, blocks_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives import Objective
from fedmm.types import ClientData, Tensors


@dataclass(frozen=True)
class LocalSchedule:
    """How long and how fast a client trains; the optimiser is fresh each round."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    clip: float | None = None


@dataclass(frozen=True)
class LocalResult:
    """What local training gives.

    Attributes:
        model: Tensors of the trained blocks.
        report: The objective's report.
        loss: Mean loss of the last epoch, over samples.
        steps: Optimiser steps done.
    """

    model: Tensors
    report: Tensors
    loss: float
    steps: int


def batches(samples: int, schedule: LocalSchedule, seed: int, *path: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, rows) of every batch: a fresh permutation an epoch, the last batch at its true size.

    Args:
        samples: Number of local samples.
        schedule: Epochs and batch size.
        seed: Run seed.
        *path: Round and client, for the stream of permutations.
    """
    generator = seeding.torch_rng(seed, "batches", *path)
    for epoch in range(schedule.epochs):
        order = torch.randperm(samples, generator=generator)
        for rows in torch.split(order, schedule.batch_size):
            yield epoch, rows


def train(
    model: MultimodalModel,
    objective: Objective,
    data: ClientData,
    modalities: Sequence[str],
    broadcast: Tensors,
    schedule: LocalSchedule,
    seed: int,
    *path: int,
) -> LocalResult:
    """Train `model`, which holds the received weights, in place on one client.

    Args:
        model: Global model as received; the client's own afterwards.
        objective: Local method.
        data: The client's training split (owned modalities).
        modalities: Those to train; others are not even looked at.
        broadcast: Server knowledge, with "round".
        schedule: Local schedule.
        seed: Run seed.
        *path: Round and client.
    """
    shown = data.only(modalities)
    state = objective.begin(model, shown, broadcast)
    blocks = set(objective.trained_blocks(blocks_of(model.state_dict()), shown.modalities))
    parameters = {n: p for n, p in model.named_parameters() if block_of(n) in blocks}
    optimiser = torch.optim.SGD(
        list(parameters.values()), schedule.lr, schedule.momentum, weight_decay=schedule.weight_decay, foreach=True
    )
    model.train()
    total, steps = torch.zeros((), dtype=torch.float64), 0
    for epoch, rows in batches(len(shown), schedule, seed, *path):
        batch = shown.batch(rows)
        step, parts = 0, 1
        while step < parts:
            # A later loss of the same batch sees the weights that the earlier one left.
            losses = objective.losses(model, batch, state)
            loss, parts = losses[step], len(losses)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            _edit(objective, parameters, state, schedule.clip)
            optimiser.step()
            step, steps = step + 1, steps + 1
            if epoch == schedule.epochs - 1:
                total += loss.detach().to(torch.float64) * len(rows)
    trained = {n: t.detach() for n, t in model.state_dict().items() if block_of(n) in blocks}
    return LocalResult(trained, objective.end(model, shown, state), float(total) / max(len(shown), 1), steps)


def _edit(objective: Objective, parameters: Tensors, state: Tensors, clip: float | None) -> None:
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    edited = objective.edit_gradients(gradients, parameters, state)
    if edited is not gradients:
        for name, gradient in edited.items():
            parameters[name].grad = gradient.detach()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip)
