"""What a stack of clients is fed: who does how many steps, and the samples of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmm.data.federation import Pool
from fedmm.types import Batch, ClientData, Presence

_GATHERED = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
"""Bytes of samples that are gathered at a time, by kind of device: what stays in the cache, or a few steps of many."""

_WIDTH = 8
"""Batches and splits are filled up to multiples of this many rows."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
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


def plan_steps(epochs: Counts, batch: Counts, samples: Counts) -> tuple[Counts, Plan]:
    """The order of clients in their stack, and who does what in it.

    Args:
        epochs: Local epochs [K].
        batch: Batch size [K].
        samples: n_k [K].
    """
    epoch_steps = -(-samples // batch)
    order = np.argsort(-epochs * epoch_steps, kind="stable")
    samples, epochs, batch, epoch_steps = samples[order], epochs[order], batch[order], epoch_steps[order]
    steps = epochs * epoch_steps
    within = np.arange(int(steps[0]))[None, :] % epoch_steps[:, None]
    sizes = np.minimum(samples[:, None] - within * batch[:, None], batch[:, None])
    sizes = np.where(np.arange(int(steps[0]))[None, :] < steps[:, None], sizes, 0)
    active = (steps[:, None] > np.arange(int(steps[0]))).sum(0)
    widths = -(-sizes.max(0) // _WIDTH) * _WIDTH
    return order, Plan(samples, steps, epoch_steps, batch, epochs, sizes, active, widths, _up(int(samples.max())))


def draw(plan: Plan, seeds: Sequence[int]) -> Counts:
    """Row of each client's data for every step and place, [S, K, B]; the draws of `Objective.batches`.

    Args:
        plan: Who does how many steps.
        seeds: Of each client's stream.
    """
    generator = torch.Generator()
    draws = []
    for seed, n, epochs in zip(seeds, plan.samples.tolist(), plan.epochs.tolist(), strict=True):
        generator.manual_seed(seed)
        draws += [torch.randperm(n, generator=generator) for _ in range(epochs)]
    # Where each drawn row goes: client, epoch, and its number in the epoch.
    client = np.repeat(np.arange(len(seeds)), plan.epochs)
    epoch = np.arange(len(client)) - np.repeat(np.cumsum(plan.epochs) - plan.epochs, plan.epochs)
    count = plan.samples[client]
    number = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    client, epoch = np.repeat(client, count), np.repeat(epoch, count)
    step, place = np.divmod(number, plan.batch_size[client])
    index = np.zeros((plan.sizes.shape[1], len(seeds), int(plan.widths.max())), dtype=np.int64)
    index[epoch * plan.epoch_steps[client] + step, client, place] = torch.cat(draws).numpy()
    return index


def batches(
    pool: Pool,
    modalities: Sequence[str],
    starts: Counts,
    plan: Plan,
    index: Counts,
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
    drawn, home = index[here], np.broadcast_to(starts[:, None], index.shape)[here]
    own, at = (torch.as_tensor(found, device=device) for found in (drawn, drawn + home))
    filled = np.broadcast_to(places < sizes, index.shape)[here]
    real = torch.as_tensor(filled, device=device)
    weight = torch.as_tensor(filled / np.broadcast_to(np.maximum(sizes, 1), index.shape)[here], device=device).to(dtype)

    def each(t: Tensor, steps: slice = slice(None)) -> list[Tensor]:
        parts = zip(torch.split(t, rows[steps]), shapes[steps], strict=True)
        return [part.view(*shape, *t.shape[1:]) for part, shape in parts]

    there = each(real)
    present = {m: there if m in whole else each(pool.present[m][at] & real) for m in modalities}
    rest = list(zip(each(pool.y.index_select(0, at)), each(own), each(weight), strict=True))
    ends, size = np.cumsum(rows), pool.sample_bytes(modalities)
    stretch_of = ends * size // _GATHERED[device.type]
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


def everything_of(pool: Pool, starts: Counts, plan: Plan, modalities: Sequence[str]) -> ClientData:
    """All samples of every member, filled up to a common number of rows."""
    place = torch.arange(plan.longest, device=pool.y.device)
    real = place < torch.as_tensor(plan.samples, device=pool.y.device).unsqueeze(1)
    at = torch.as_tensor(starts, device=pool.y.device).unsqueeze(1) + torch.where(real, place, 0)
    rows = at.flatten()
    return ClientData(
        {m: pool.x[m].index_select(0, rows).view(*at.shape, *pool.x[m].shape[1:]) for m in modalities},
        {m: real if m in pool.complete else pool.present[m][at] & real for m in modalities},
        torch.where(real, pool.y[at], 0),
        pool.classes,
        real,
        pool.complete.intersection(modalities),
    )


def rows_of(data: ClientData, rows: Tensor) -> ClientData:
    """Some clients of a stack."""
    return ClientData(
        {m: x[rows] for m, x in data.x.items()},
        {m: p[rows] for m, p in data.present.items()},
        data.y[rows],
        data.classes,
        None if data.real is None else data.real[rows],
        data.whole,
    )


def _up(n: int) -> int:
    return -(-n // _WIDTH) * _WIDTH
