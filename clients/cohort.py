"""Train many clients at once, as one stacked computation that equals training them one by one.

Every tensor of the model has a leading axis of K clients; a step is one forward and one backward pass for all of them.
Clients differ in samples and steps: those with more steps come first, so that a step computes a prefix of the stack
and no client that has finished; batches are filled up to a common width with rows of weight zero.

On a CPU the widths are multiples of 8: matrix products then sum in the same order whatever the stack, so that a client
trained alone and in company comes out the same to the last bit, but for layers of a few numbers, whose products take
another kernel when they grow, and for convolutions, which sum over the whole width (`company` of `train_stack` keeps
it). The plain, readable equivalent is `clients.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.optimiser import StackedSGD
from clients.trainer import LocalSchedule, gradients_of
from fedmm import seeding
from fedmm.data.federation import Pool
from fedmm.metrics.local import STATISTICS, before_training
from fedmm.models.blocks import block_of, blocks_of
from fedmm.models.stacked import Stack
from fedmm.objectives import Objective
from fedmm.personal import corrected, corrections
from fedmm.types import Batch, ClientData, Presence, Tensors

_GATHERED = 8 * 2**20
"""Bytes of samples that are gathered at a time."""

_WIDTH = 8
"""Batches and splits are filled up to multiples of this many rows."""

Counts = npt.NDArray[np.int64]


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
    order, plan = _schedule(members, pool.sizes[[m.client for m in members]])
    if company:
        _, whole = _schedule(company, pool.sizes[[m.client for m in company]])
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
            own.append(_whole(pool, starts, plan, list(pool.x) if requests else names))
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
        return objective.renew(model, _rows(everything().only(names), rows), {n: t[rows] for n, t in state.items()})

    renews = type(objective).renew is not Objective.renew
    weights, losses, parts = _train(
        stack,
        received,
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


@dataclass(frozen=True)
class _Plan:
    """Who does how many steps with how many samples; clients with more steps first.

    Attributes:
        samples: n_k [K].
        steps: S_k [K], descending.
        epoch_steps: Steps an epoch [K].
        batch_size: [K].
        epochs: [K].
        sizes: True batch size of each step [K, S].
        active: Clients that are not done, of each step [S].
        widths: Rows of a batch of each step [S].
        longest: Rows that all samples of a client are filled up to.
    """

    samples: Counts
    steps: Counts
    epoch_steps: Counts
    batch_size: Counts
    epochs: Counts
    sizes: Counts
    active: Counts
    widths: Counts
    longest: int


def _schedule(members: Sequence[Member], samples: Counts) -> tuple[Counts, _Plan]:
    epochs = np.array([m.schedule.epochs for m in members], dtype=np.int64)
    batch = np.array([m.schedule.batch_size for m in members], dtype=np.int64)
    epoch_steps = -(-samples // batch)
    order = np.argsort(-epochs * epoch_steps, kind="stable")
    samples, epochs, batch, epoch_steps = samples[order], epochs[order], batch[order], epoch_steps[order]
    steps = epochs * epoch_steps
    within = np.arange(int(steps[0]))[None, :] % epoch_steps[:, None]
    sizes = np.minimum(samples[:, None] - within * batch[:, None], batch[:, None])
    sizes = np.where(np.arange(int(steps[0]))[None, :] < steps[:, None], sizes, 0)
    active = (steps[:, None] > np.arange(int(steps[0]))).sum(0)
    widths = -(-sizes.max(0) // _WIDTH) * _WIDTH
    return order, _Plan(samples, steps, epoch_steps, batch, epochs, sizes, active, widths, _up(int(samples.max())))


def _batches(plan: _Plan, members: Sequence[Member], seed: int, round: int) -> npt.NDArray[np.int64]:
    """Row of each client's data for every step and place, [S, K, B]; the draws of `Objective.batches`."""
    generator = torch.Generator()
    draws = []
    for member, n, epochs in zip(members, plan.samples.tolist(), plan.epochs.tolist(), strict=True):
        generator.manual_seed(seeding.derive(seed, "batches", round, member.client))
        draws += [torch.randperm(n, generator=generator) for _ in range(epochs)]
    # Where each drawn row goes: client, epoch, and its number in the epoch.
    client = np.repeat(np.arange(len(members)), plan.epochs)
    epoch = np.arange(len(client)) - np.repeat(np.cumsum(plan.epochs) - plan.epochs, plan.epochs)
    count = plan.samples[client]
    number = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    client, epoch = np.repeat(client, count), np.repeat(epoch, count)
    step, place = np.divmod(number, plan.batch_size[client])
    index = np.zeros((plan.sizes.shape[1], len(members), int(plan.widths.max())), dtype=np.int64)
    index[epoch * plan.epoch_steps[client] + step, client, place] = torch.cat(draws).numpy()
    return index


def _train(
    stack: Stack,
    received: Tensors,
    trained: Sequence[str],
    objective: Objective,
    pool: Pool,
    members: Sequence[Member],
    modalities: Sequence[str],
    starts: Counts,
    plan: _Plan,
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
    last = np.arange(len(plan.active))[:, None] >= (plan.steps - plan.epoch_steps)[None, :]
    counted = torch.as_tensor(plan.sizes.T * last, device=device).to(torch.float64).unbind(0)
    counts_at = last.any(1).tolist()
    dtype = next(iter(received.values())).dtype
    feed = _fed(pool, modalities, starts, plan, _batches(plan, members, seed, round), dtype)
    noisy = type(objective).noise is not Objective.noise
    generators = [seeding.torch_rng(seed, "noise", round, m.client) for m in members] if noisy else []
    total = torch.zeros(count, dtype=torch.float64, device=device)
    optimiser = StackedSGD(stack, received, trained, count, members[0].schedule)
    kept = [n for n in state if n.startswith("kept.")]
    active, mine, parts = -1, state, 1
    for step in range(len(plan.active)):
        if plan.active[step] != active:
            active = int(plan.active[step])
            mine = {n: t[:active] for n, t in state.items()}
            optimiser.narrow(active)
            ones = torch.ones(active, dtype=dtype, device=device)
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
                    found = torch.autograd.grad(loss, list(parameters.values()), ones, allow_unused=True)
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
                total[:active].addcmul_(loss.detach().to(torch.float64), counted[step][:active])
            part += 1
    return optimiser.weights(), total.cpu(), parts


def _fed(
    pool: Pool,
    modalities: Sequence[str],
    starts: Counts,
    plan: _Plan,
    index: npt.NDArray[np.int64],
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """The batch of every step: of the clients that are not done, as wide as the largest of them needs.

    The samples of several steps are gathered at once, one step behind the other.

    Args:
        pool: Samples of all clients.
        modalities: Those to train.
        starts: First row of each client in the pool [K].
        plan: Who does how many steps.
        index: Row of each sample in its client's data [S, K, B].
        dtype: Of the samples' weights.
    """
    whole, device = pool.complete.intersection(modalities), pool.y.device
    shapes = list(zip(plan.active.tolist(), plan.widths.tolist(), strict=True))
    rows = [active * width for active, width in shapes]
    clients, places = np.arange(index.shape[1])[:, None], np.arange(index.shape[2])
    here = (clients < plan.active[:, None, None]) & (places < plan.widths[:, None, None])
    sizes = plan.sizes.T[:, :, None]
    own, home = index[here], np.broadcast_to(starts[:, None], index.shape)[here]
    own, at = (torch.as_tensor(found, device=device) for found in (own, own + home))
    filled = np.broadcast_to(places < sizes, index.shape)[here]
    real = torch.as_tensor(filled, device=device)
    weight = torch.as_tensor(filled / np.broadcast_to(np.maximum(sizes, 1), index.shape)[here], device=device).to(dtype)

    def each(t: Tensor, steps: slice = slice(None)) -> list[Tensor]:
        parts = zip(t.split(rows[steps]), shapes[steps], strict=True)
        return [part.view(*shape, *t.shape[1:]) for part, shape in parts]

    there = each(real)
    present = {m: there if m in whole else each(pool.present[m][at] & real) for m in modalities}
    rest = list(zip(each(pool.y.index_select(0, at)), each(own), each(weight), strict=True))
    ends, size = np.cumsum(rows), pool.sample_bytes(modalities)
    stretch_of = ends * size // _GATHERED
    for stretch in np.unique(stretch_of):
        first, last = np.flatnonzero(stretch_of == stretch)[[0, -1]].tolist()
        steps = slice(first, last + 1)
        some = at[ends[first] - rows[first] : ends[last]]
        x = {m: each(pool.x[m].index_select(0, some), steps) for m in modalities}
        for i in range(first, last + 1):
            yield Batch(
                {m: t[i - first] for m, t in x.items()},
                Presence({m: t[i] for m, t in present.items()}, whole),
                *rest[i],
            )


def _whole(pool: Pool, starts: Counts, plan: _Plan, modalities: Sequence[str]) -> ClientData:
    """All samples of every member, filled up to a common number of rows."""
    place = torch.arange(plan.longest, device=pool.y.device)
    real = place < torch.as_tensor(plan.samples, device=pool.y.device).unsqueeze(1)
    at = torch.as_tensor(starts, device=pool.y.device).unsqueeze(1) + torch.where(real, place, 0)
    return ClientData(
        {m: pool.x[m][at] for m in modalities},
        {m: pool.present[m][at] & real for m in modalities},
        torch.where(real, pool.y[at], 0),
        pool.classes,
        real,
    )


def _rows(data: ClientData, rows: Tensor) -> ClientData:
    """Some clients of a stack."""
    return ClientData(
        {m: x[rows] for m, x in data.x.items()},
        {m: p[rows] for m, p in data.present.items()},
        data.y[rows],
        data.classes,
        None if data.real is None else data.real[rows],
    )


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


def _up(n: int) -> int:
    return -(-n // _WIDTH) * _WIDTH
