"""Train many clients at once, as one stacked computation that equals training them one by one.

Every tensor of the model has a leading axis of K clients; a step is one forward and one backward pass for all of them.
Clients differ in samples and steps: those with more steps come first, so that a step computes a prefix of the stack
and no client that has finished; batches are filled up to a common width with rows of weight zero.

On a CPU the layers' kernels (`fedmm.native`) sum in one order whatever the stack and whatever rows fill up a batch, so
that a client trained alone and in company comes out the same to the last bit. Some objectives sum over a batch with
PyTorch's operators, whose order hangs on its width (`company` of `train_stack` keeps it), as that of all layers does
without the kernels. The plain, readable equivalent is `clients.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from clients.feed import Counts, Plan, batches, draw, everything_of, plan_steps, rows_of
from clients.optimiser import StackedSGD
from clients.trainer import LocalSchedule, gradients_of
from fedmm import seeding
from fedmm.data.federation import Pool
from fedmm.metrics.local import STATISTICS, before_training
from fedmm.models.blocks import block_of, blocks_of
from fedmm.models.stacked import Stack
from fedmm.objectives import Objective
from fedmm.personal import corrected, corrections
from fedmm.types import ClientData, Tensors


@dataclass(frozen=True)
class Member:
    """One client of a stack: its place in the seed tree, and its own schedule."""

    client: int
    schedule: LocalSchedule


@dataclass(frozen=True)
class StackResult:
    """What training a stack gives, in the order of its members.

    Attributes:
        model: Trained tensors [K, ...] in the stack's layout (`Stack.plain` turns them).
        report: Statistics and the objective's report, [K, ...] each.
        loss: Mean loss of each client's last epoch, float64 [K].
        steps: Optimiser steps, int64 [K].
    """

    model: Tensors
    report: Tensors
    loss: Tensor
    steps: Tensor


class Meter:
    """Seconds spent in training proper: forward, backward and update."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        start = perf_counter()
        yield
        self.seconds += perf_counter() - start


def train_stack(
    stack: Stack,
    received: Tensors,
    objective: Objective,
    pool: Pool,
    members: Sequence[Member],
    modalities: Sequence[str],
    broadcast: Tensors,
    seed: int,
    round: int,
    requests: Sequence[str] = (),
    meter: Meter | None = None,
    company: Sequence[Member] = (),
) -> StackResult:
    """Train all members, which train the same modalities, from the received weights.

    Args:
        stack: The model's stacked twin.
        received: Global model, in the plain layout.
        objective: Local method that stacks.
        pool: Training samples of all clients.
        members: Who trains; learning rate, momentum, decay and clipping are the first one's.
        modalities: Those to train; others are not even looked at.
        broadcast: Server knowledge, with "round"; of what is the clients' own ("client.") a row a member.
        seed: Run seed.
        round: Round, for the seed tree.
        requests: Statistics to report (`fedmm.metrics.local.STATISTICS`).
        meter: Collects the time of training proper.
        company: The stack that the members are a part of, if the others do not train here: it sets the widths, so
            that no sum is cut up differently.
    """
    order, plan = _planned(members, pool)
    if company:
        _, whole = _planned(company, pool)
        plan = replace(plan, widths=whole.widths[: len(plan.widths)], longest=whole.longest)
    members, meter = [members[i] for i in order], meter or Meter()
    count, names = len(members), [m for m in pool.x if m in set(modalities)]
    starts = pool.starts[[m.client for m in members]]
    model = stack.model
    shared = stack.expand_all(received, count)
    own_rows = torch.as_tensor(order, device=pool.y.device)
    sight = {n: t[own_rows] if n.startswith("client.") else stack.share(n, t, count) for n, t in broadcast.items()}
    own: list[ClientData] = []

    def everything() -> ClientData:
        # Only some objectives and statistics look at all samples of a client.
        if not own:
            own.append(everything_of(pool, starts, plan, list(pool.x) if requests else names))
        return own[0]

    report: Tensors = {}
    early = before_training(requests, round)
    begins = type(objective).begin is not Objective.begin
    if early or begins:
        stack.bind(shared)
    for name in early:
        report |= STATISTICS[name](model, _owned(everything(), pool, members[0].client))
    state = objective.begin(model, everything().only(names), sight) if begins else {}

    blocks = set(objective.trained_blocks(blocks_of(received), tuple(names)))
    trained = [n for n in received if block_of(n) in blocks]

    def renew(rows: Tensor) -> Tensors:
        return objective.renew(model, rows_of(everything().only(names), rows), {n: t[rows] for n, t in state.items()})

    renews = type(objective).renew is not Objective.renew
    weights, losses, parts = _train(
        stack,
        shared,
        trained,
        objective,
        pool,
        members,
        names,
        starts,
        plan,
        state,
        corrections(sight, trained, stack.stack),
        renew if renews else None,
        seed,
        round,
        meter,
    )
    if requests or type(objective).end is not Objective.end:
        stack.bind(shared | weights)
    late = [n for n in requests if n not in early]
    for name in late:
        report |= STATISTICS[name](model, _owned(everything(), pool, members[0].client))
    if type(objective).end is not Objective.end:
        report |= objective.end(model, everything().only(names), state)
    loss, steps = losses / torch.as_tensor(plan.samples), torch.as_tensor(plan.steps * parts)
    back = np.argsort(order)
    if (back == np.arange(count)).all():
        return StackResult(weights, report, loss, steps)
    there = torch.as_tensor(back, device=pool.y.device)
    return StackResult(
        {n: t[there] for n, t in weights.items()}, {n: t[there] for n, t in report.items()}, loss[back], steps[back]
    )


def _owned(data: ClientData, pool: Pool, client: int) -> ClientData:
    """Statistics look at all modalities that a client owns, trained or not."""
    return data.only(pool.owned[client])


def _planned(members: Sequence[Member], pool: Pool) -> tuple[Counts, Plan]:
    epochs = np.array([m.schedule.epochs for m in members], dtype=np.int64)
    batch = np.array([m.schedule.batch_size for m in members], dtype=np.int64)
    return plan_steps(epochs, batch, pool.sizes[[m.client for m in members]])


def _train(
    stack: Stack,
    shared: Tensors,
    trained: Sequence[str],
    objective: Objective,
    pool: Pool,
    members: Sequence[Member],
    modalities: Sequence[str],
    starts: Counts,
    plan: Plan,
    state: Tensors,
    added: Tensors,
    renew: Callable[[Tensor], Tensors] | None,
    seed: int,
    round: int,
    meter: Meter,
) -> tuple[Tensors, Tensor, int]:
    """All steps: the trained tensors [K, ...] in the stack's layout, losses of the last epoch [K], steps a batch.

    `state` is left as the last step of each client left it; `added` is added to every gradient.
    """
    count, device = len(members), pool.y.device
    # Samples of each step that belongs to its client's last epoch, whose losses are reported.
    last = plan.sizes.T * (np.arange(len(plan.active))[:, None] >= plan.steps - plan.epoch_steps)
    counts_at: list[bool] = np.any(last, axis=1).tolist()
    dtype = next(iter(shared.values())).dtype
    drawn = draw(plan, [seeding.derive(seed, "batches", round, m.client) for m in members])
    feed = batches(pool, modalities, starts, plan, drawn, dtype)
    noisy = type(objective).noise is not Objective.noise
    generators = [seeding.torch_rng(seed, "noise", round, m.client) for m in members] if noisy else []
    seen_losses: list[Tensor] = []
    optimiser = StackedSGD(stack, shared, trained, members[0].schedule)
    kept = [n for n in state if n.startswith("kept.")]
    active, mine, parts = -1, state, 1
    for step in range(len(plan.active)):
        if plan.active[step] != active:
            active = int(plan.active[step])
            mine = {n: t[:active] for n, t in state.items()}
            optimiser.narrow(active)
        if renew is not None and (begun := np.flatnonzero(step % plan.epoch_steps[:active] == 0)).size and step:
            which = torch.as_tensor(begun, device=device)
            optimiser.show(which)
            for n, fresh in renew(which).items():
                state[n] = state[n].index_copy(0, which, fresh)
            mine = {n: t[:active] for n, t in state.items()}
            optimiser.narrow(active)
        batch = next(feed)
        part, parts = 0, 1
        while part < parts:
            with meter.running():
                parameters = optimiser.parameters()
                seen = dict(mine)
                losses = objective.losses(stack.model, batch, seen)
                if objective.one_step:
                    loss, parts = torch.stack(losses).sum(0), 1
                    each = gradients_of(losses, parameters)
                    with torch.no_grad():
                        gradients = objective.combine(each, parameters, seen)
                else:
                    loss, parts = losses[part], len(losses)
                    # Of the sum: each client's loss has its own weights.
                    found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
                    gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
                if noisy:
                    seen |= _noise(stack, objective, parameters, generators[:active])
                with torch.no_grad():
                    gradients = corrected(objective.edit_gradients(gradients, parameters, seen), added)
                    optimiser.step(gradients)
            for n in kept:
                mine[n] = seen[n].detach()
                state[n] = mine[n] if active == count else torch.cat([mine[n], state[n][active:]])
            if counts_at[step]:
                seen_losses.append(loss.detach())
            part += 1
    return optimiser.weights(), _total_losses(seen_losses, last[counts_at], parts), parts


def _total_losses(losses: Sequence[Tensor], samples: Counts, parts: int) -> Tensor:
    """Sum of loss times samples of each client, float64 [K], over steps of `parts` losses each.

    Args:
        losses: Of the clients that are not done, in the order of steps.
        samples: Of each of these steps [S, K].
        parts: Losses a step.
    """
    places = np.concatenate([np.arange(len(loss)) for loss in losses])
    rows = np.repeat(samples, parts, axis=0)
    weights = np.concatenate([row[: len(loss)] for row, loss in zip(rows, losses, strict=True)])
    each = torch.cat(list(losses)).cpu().to(torch.float64).numpy()
    return torch.from_numpy(np.bincount(places, weights * each, samples.shape[1]))


def _noise(stack: Stack, objective: Objective, parameters: Tensors, generators: Sequence[torch.Generator]) -> Tensors:
    """Each client's own noise, drawn in the plain layout as if it trained alone."""
    shapes = {n: stack.plain(n, p.detach())[0] for n, p in parameters.items()}
    draws = [objective.noise(shapes, g) for g in generators]
    return {
        key: stack.stack(key.partition(".")[2], torch.stack([d[key] for d in draws])).to(
            next(iter(parameters.values())).device
        )
        for key in (draws[0] if draws else {})
    }
