"""Train many clients at once, as one stacked computation that equals training them one by one.

Every tensor of the model has a leading axis of K clients; a step is one forward and one backward pass for all of them.
Clients differ in samples and steps: those with more steps come first, so that a step computes a prefix of the stack
and no client that has finished; batches are filled up to a common width with rows of weight zero.

On a CPU the widths are multiples of 8: matrix products then sum in the same order whatever the stack, so that a client
trained alone and in company comes out the same to the last bit (float64 or not). The plain, readable equivalent is
`clients.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.trainer import LocalSchedule, gradients_of
from fedmm import seeding
from fedmm.data.federation import Pool
from fedmm.metrics.local import STATISTICS
from fedmm.models.blocks import block_of, blocks_of
from fedmm.models.stacked import Stack
from fedmm.objectives import Objective
from fedmm.types import Batch, ClientData, Tensors

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
) -> StackResult:
    """Train all members, which train the same modalities, from the received weights.

    Args:
        stack: The model's stacked twin.
        received: Global model, in the plain layout.
        objective: Local method that stacks.
        pool: Training samples of all clients.
        members: Who trains; learning rate, momentum, decay and clipping are the first one's.
        modalities: Those to train; others are not even looked at.
        broadcast: Server knowledge, with "round".
        seed: Run seed.
        round: Round, for the seed tree.
        requests: Statistics to report (`fedmm.metrics.local.STATISTICS`).
        meter: Collects the time of training proper.
    """
    meter = meter or Meter()
    order, plan = _schedule(members, pool.sizes[[m.client for m in members]])
    members = [members[i] for i in order]
    count, names = len(members), [m for m in pool.x if m in set(modalities)]
    starts = torch.as_tensor(pool.starts[[m.client for m in members]], device=pool.y.device)
    model = stack.model
    stack.bind({n: stack.expand(n, t, count) for n, t in received.items()})
    sight = {
        n: stack.expand(n.removeprefix("model."), t, count) if n.startswith("model.") else t.expand(count, *t.shape)
        for n, t in broadcast.items()
    }
    own: list[ClientData] = []

    def everything() -> ClientData:
        # Only some objectives and statistics look at all samples of a client.
        if not own:
            own.append(_whole(pool, starts, plan.samples, list(pool.x) if requests else names))
        return own[0]

    report: Tensors = {}
    early = [n for n in requests if n == "confidence" or round == 0]
    for name in early:
        report |= STATISTICS[name](model, _owned(everything(), pool, members[0].client))
    begins = type(objective).begin is not Objective.begin
    state = objective.begin(model, everything().only(names), sight) if begins else {}

    blocks = set(objective.trained_blocks(blocks_of(received), tuple(names)))
    trained = [n for n in received if block_of(n) in blocks]
    model.train()

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
        renew if renews else None,
        seed,
        round,
        meter,
    )
    model.eval()
    stack.bind({n: stack.expand(n, t, count) for n, t in received.items() if n not in weights} | weights)
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
    """

    samples: Counts
    steps: Counts
    epoch_steps: Counts
    batch_size: Counts
    epochs: Counts
    sizes: Counts


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
    return order, _Plan(samples, steps, epoch_steps, batch, epochs, sizes)


def _batches(plan: _Plan, members: Sequence[Member], seed: int, round: int) -> npt.NDArray[np.int64]:
    """Row of each client's data for every step and place, [K, S, B]; the draws of `Objective.batches`."""
    width = _up(int(plan.sizes.max()))
    index = np.zeros((len(members), plan.sizes.shape[1], max(width, int(plan.batch_size.max()))), dtype=np.int64)
    for k, member in enumerate(members):
        generator = seeding.torch_rng(seed, "batches", round, member.client)
        n, size, per = int(plan.samples[k]), int(plan.batch_size[k]), int(plan.epoch_steps[k])
        rows = np.zeros(per * size, dtype=np.int64)
        for epoch in range(int(plan.epochs[k])):
            rows[:n] = torch.randperm(n, generator=generator).numpy()
            index[k, epoch * per : (epoch + 1) * per, :size] = rows.reshape(per, size)
    return index[:, :, :width]


def _train(
    stack: Stack,
    received: Tensors,
    trained: Sequence[str],
    objective: Objective,
    pool: Pool,
    members: Sequence[Member],
    modalities: Sequence[str],
    starts: Tensor,
    plan: _Plan,
    state: Tensors,
    renew: Callable[[Tensor], Tensors] | None,
    seed: int,
    round: int,
    meter: Meter,
) -> tuple[Tensors, Tensor, int]:
    """All steps: the trained tensors [K, ...] in the stack's layout, losses of the last epoch [K], steps a batch.

    `state` is left as the last step of each client left it.
    """
    count, device = len(members), pool.y.device
    rows = torch.as_tensor(_batches(plan, members, seed, round), device=device)
    place = torch.arange(rows.shape[2], device=device)
    sizes = torch.as_tensor(plan.sizes, device=device)
    real = place < sizes.unsqueeze(-1)
    shares = real.to(next(iter(received.values())).dtype) / sizes.unsqueeze(-1).clamp(min=1)
    last = torch.as_tensor(np.arange(rows.shape[1])[None, :] >= (plan.steps - plan.epoch_steps)[:, None], device=device)
    counted = (sizes * last).to(torch.float64)
    noisy = type(objective).noise is not Objective.noise
    generators = [seeding.torch_rng(seed, "noise", round, m.client) for m in members] if noisy else []
    total = torch.zeros(count, dtype=torch.float64, device=device)
    optimiser = _StackedSGD(stack, received, trained, count, members[0].schedule)
    kept = [n for n in state if n.startswith("kept.")]
    active, mine, parts = -1, state, 1
    for step in range(rows.shape[1]):
        now = int((plan.steps > step).sum())
        if now != active:
            active = now
            mine = {n: t[:active] for n, t in state.items()}
            optimiser.narrow(active)
        if renew is not None and (begun := np.flatnonzero(step % plan.epoch_steps[:active] == 0)).size and step:
            which = torch.as_tensor(begun, device=device)
            optimiser.show(which)
            for n, fresh in renew(which).items():
                state[n] = state[n].index_copy(0, which, fresh)
            mine = {n: t[:active] for n, t in state.items()}
            optimiser.narrow(active)
        width = _up(int(plan.sizes[:active, step].max()))
        batch = _batch(pool, modalities, starts[:active], rows, real, shares, active, step, width)
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
                    found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
                    gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
                if noisy:
                    seen |= _noise(stack, objective, parameters, generators[:active])
                with torch.no_grad():
                    gradients = objective.edit_gradients(gradients, parameters, seen)
                    optimiser.step(gradients)
            for n in kept:
                mine[n] = seen[n].detach()
                state[n] = mine[n] if active == count else torch.cat([mine[n], state[n][active:]])
            total[:active] += loss.detach().to(torch.float64) * counted[:active, step]
            part += 1
    return optimiser.weights(), total.cpu(), parts


def _batch(
    pool: Pool,
    modalities: Sequence[str],
    starts: Tensor,
    rows: Tensor,
    real: Tensor,
    shares: Tensor,
    active: int,
    step: int,
    width: int,
) -> Batch:
    index, here = rows[:active, step, :width], real[:active, step, :width]
    at = index + starts.unsqueeze(1)
    present = {m: here if m in pool.complete else pool.present[m][at] & here for m in modalities}
    return Batch({m: pool.x[m][at] for m in modalities}, present, pool.y[at], index, shares[:active, step, :width])


def _whole(pool: Pool, starts: Tensor, samples: Counts, modalities: Sequence[str]) -> ClientData:
    """All samples of every member, filled up to a common number of rows."""
    place = torch.arange(_up(int(samples.max())), device=pool.y.device)
    real = place < torch.as_tensor(samples, device=pool.y.device).unsqueeze(1)
    at = starts.unsqueeze(1) + torch.where(real, place, 0)
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


class _StackedSGD:
    """`clients.trainer.sgd_step` on stacks; the first step makes the copies that the clients diverge from.

    Until a tensor's first gradient, all clients share the received one.
    """

    def __init__(
        self, stack: Stack, received: Tensors, trained: Sequence[str], count: int, schedule: LocalSchedule
    ) -> None:
        self._stack = stack
        self._rates = schedule.lr, schedule.momentum, schedule.weight_decay, schedule.clip
        self._w = {n: stack.expand(n, received[n], count) for n in trained}
        self._fixed = {n: stack.expand(n, t, count) for n, t in received.items() if n not in self._w}
        self._v: Tensors = {}
        self._owned: set[str] = set()
        self._count = self._active = count
        self._bound: Tensors | None = None

    def narrow(self, active: int) -> None:
        """Go on with the first `active` clients."""
        self._active, self._bound = active, None
        self._stack.bind({n: w[:active] for n, w in self._fixed.items()})

    def show(self, rows: Tensor) -> None:
        """Bind the weights of some clients to the twin, to look at; `narrow` goes on."""
        self._stack.bind({n: t[rows] for n, t in (self._fixed | self._w).items()})

    def parameters(self) -> Tensors:
        """The active clients' tensors, as parameters of the twin."""
        if self._bound is None:
            self._bound = self._stack.bind({n: w[: self._active] for n, w in self._w.items()})
        return self._bound

    def step(self, gradients: Tensors) -> None:
        """One step of SGD with clipping, weight decay and momentum; tensors without gradient stay."""
        if not gradients:
            return
        lr, momentum, decay, clip = self._rates
        g = {n: t.contiguous() for n, t in gradients.items()}
        if clip is not None:
            norm = torch.stack([t.flatten(1).square().sum(1) for t in g.values()]).sum(0).sqrt()
            scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
            g = {n: t * scale.reshape(-1, *[1] * (t.dim() - 1)) for n, t in g.items()}
        names = list(g)
        w = [self._w[n][: self._active] for n in names]
        update = list(g.values())
        if decay:
            update = list(torch._foreach_add(update, w, alpha=decay))
        if momentum:
            update = self._accelerate(names, update, momentum)
        fresh = [i for i, n in enumerate(names) if n not in self._owned]
        for i in fresh:
            if self._active < self._count:
                self._w[names[i]] = self._w[names[i]].contiguous()
                w[i] = self._w[names[i]][: self._active]
                w[i].add_(update[i], alpha=-lr)
            else:
                self._w[names[i]] = torch.add(w[i], update[i], alpha=-lr).contiguous()
        if fresh:
            self._owned |= set(names)
            self._bound = None
        if old := [i for i in range(len(names)) if i not in set(fresh)]:
            torch._foreach_add_([w[i] for i in old], [update[i] for i in old], alpha=-lr)

    def _accelerate(self, names: Sequence[str], update: list[Tensor], momentum: float) -> list[Tensor]:
        """V <- momentum v + g; the first gradient becomes v itself."""
        known = [i for i, n in enumerate(names) if n in self._v]
        if known:
            v = [self._v[names[i]][: self._active] for i in known]
            torch._foreach_mul_(v, momentum)
            torch._foreach_add_(v, [update[i] for i in known])
        met: set[int] = set()
        for i, n in enumerate(names):
            if n not in self._v:
                # Autograd may hand one tensor to two parameters, or one that its graph still holds.
                v0 = update[i].clone() if update[i].data_ptr() in met or self._active < self._count else update[i]
                met.add(v0.data_ptr())
                if self._active < self._count:
                    whole = v0.new_zeros(self._count, *v0.shape[1:])
                    whole[: self._active] = v0
                    v0 = whole
                self._v[n] = v0
        return [self._v[n][: self._active] for n in names]

    def weights(self) -> Tensors:
        """All trained tensors [K, ...]."""
        return dict(self._w)


def _up(n: int) -> int:
    return -(-n // _WIDTH) * _WIDTH
