"""Buffered asynchronous training (FedBuff: Nguyen et al., AISTATS 2022, algorithm 1), block by block.

    w_b <- w_b + sum_i n_i s(tau_i) (w_{i,b} - w_b^{v_i}) / sum_i n_i     over the buffered updates i that trained b

v_i is the model version that client i started from, tau_i the number of versions made since, and the server's
learning rate is 1. With equal sample counts n_i this is the paper's mean over the buffer. When it arrives in which
buffer is decided by `fedmm.engines.buffered`; a "round" is the making of one version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmm.config.devices import DevicesConfig
from fedmm.engines.buffered import BufferedRun, Entry
from fedmm.io.run_directory import Row
from fedmm.models.blocks import block_of, is_float, modality_of
from fedmm.models.width import corner, held_mean, padded
from fedmm.trees import tree_sum
from fedmm.types import Tensors
from server.aggregation import Gathered, Update
from server.facts import Federates
from server.gathering import Collector
from server.plan import Plan
from server.policy import Event
from server.selection import Pick
from server.session import Parcel
from server.timing import Timing, failures, row


@dataclass(frozen=True)
class Arrived:
    """An admitted update of the buffer.

    Attributes:
        update: With its model.
        sent: The model that it started from.
        weight: s(tau), from its staleness.
    """

    update: Update
    sent: Tensors
    weight: float


def buffered_mean(current: Tensors, buffer: Sequence[Arrived], min_owners: int = 1) -> Tensors:
    """The next version, by the module's equation, in float64.

    Args:
        current: The version to build on; kept where nobody trained.
        buffer: In order of arrival.
        min_owners: Blocks of a modality that fewer updates trained keep their value.

    Returns:
        Names, shapes and dtypes of `current`. Float buffers move with their block, integer buffers take the maximum.
        Where clients hold parts of a tensor, each entry's mean is over those who hold it.
    """
    result: Tensors = {}
    for name, old in current.items():
        mine = [a for a in buffer if name in a.update.model]
        enough = min_owners if modality_of(block_of(name)) is not None else 1
        if len({a.update.client for a in mine}) < enough:
            result[name] = old
        elif not is_float(old):
            result[name] = torch.stack([old, *(a.update.model[name] for a in mine)]).amax(0)
        else:
            total = tree_sum([_moved(a, name, old.shape) for a in mine])
            assert total is not None
            holders = [(a.update.model[name].shape, float(a.update.samples)) for a in mine]
            result[name] = (old.double() + held_mean(total, holders, torch.zeros_like(total))).to(old.dtype)
    return result


def _moved(arrived: Arrived, name: str, shape: torch.Size) -> torch.Tensor:
    """n_i s(tau_i) times the change of a tensor, float64; zero where the client holds no part of it."""
    new = arrived.update.model[name]
    sent = corner({name: arrived.sent[name]}, {name: new.shape})[name]
    return padded(arrived.update.samples * arrived.weight * (new.double() - sent.double()), shape)


@dataclass(frozen=True)
class Step:
    """What came in for one version: updates by client, the same in order of arrival, and figures of the round."""

    updates: Gathered
    buffer: tuple[Arrived, ...]
    asked: int
    events: list[Event]
    rows: list[Row]


class Asynchronous:
    """Clients train at any time, each from the version that was current when it began.

    Args:
        plan: The run.
        devices: The `devices` section.
        collector: Asks the clients.
        timing: Clock and cost; its clock follows the event queue's.
        federates: Facts of the federation.
        first: The initial model with what is broadcast along.
    """

    def __init__(
        self,
        plan: Plan,
        devices: DevicesConfig,
        collector: Collector,
        timing: Timing,
        federates: Federates,
        first: Parcel,
    ) -> None:
        self._plan, self._collector, self._timing = plan, collector, timing
        self._picks = {k: Pick(k, federates.owned[k]) for k, n in enumerate(federates.samples) if n > 0}
        expected, epochs = collector.expectations(first.model), plan.config.train.local_epochs
        work = {k: timing.work(pick, first, expected(pick), epochs) for k, pick in self._picks.items()}
        self._queue = BufferedRun(timing.fleet, work, devices.buffer, plan.config.seed, devices.deadline_s)
        self._versions: dict[int, Parcel] = {}

    def advance(self, parcel: Parcel) -> Step:
        """Run the queue until the buffer is full, and train what is in it.

        Args:
            parcel: The current version and what is broadcast along.
        """
        self._versions[self._queue.version] = parcel
        step = next(self._queue)
        found: dict[int, Update] = {}
        for wave in _waves(step.entries):
            version, task = wave[0].start_version, {e.client: e.task for e in wave}
            # Streams begin at 1: path 0 of the seed tree is the bootstrap's.
            terms = {k: replace(self._collector.terms_of(k), stream=n + 1) for k, n in task.items()}
            updates = self._collector.collect(
                [self._picks[e.client] for e in wave],
                version + 1,
                self._plan.config.train.local_epochs,
                self._versions[version],
                terms=terms,
                each=True,
            )
            found |= {task[u.client]: u for u in updates}
        buffer = tuple(
            Arrived(found[e.task], self._versions[e.start_version].model, e.weight)
            for e in step.entries
            if e.task in found
        )
        in_use = self._queue.versions_in_use()
        self._versions = {v: sent for v, sent in self._versions.items() if v in in_use}
        self._timing.clock = self._queue.clock
        rows = [
            row(step.version, "dropouts", len(step.failed)),
            row(step.version, "staleness", sum(e.staleness for e in step.entries) / len(step.entries)),
            *self._timing.passed(step.version, step.spent),
        ]
        admitted = tuple(sorted((a.update for a in buffer), key=lambda u: u.client))
        return Step(Gathered(admitted), buffer, len(step.entries), failures(step.version, step.failed), rows)

    # -- keeping ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain values, for the checkpoint."""
        return self._queue.state()

    def tensors(self) -> Tensors:
        """Older versions that updates to come start from, "<version>/<model or broadcast>/<name>"."""
        return {
            f"{version}/{part}/{name}": tensor
            for version, sent in self._versions.items()
            for part, tensors in (("model", sent.model), ("broadcast", sent.broadcast))
            for name, tensor in tensors.items()
        }

    def restore(self, state: Mapping[str, Any], tensors: Tensors) -> None:
        """Take up a checkpoint's `state` and `tensors`."""
        self._queue.restore(state)
        parts: dict[int, dict[str, Tensors]] = {}
        for key, tensor in tensors.items():
            version, part, name = key.split("/", 2)
            parts.setdefault(int(version), {"model": {}, "broadcast": {}})[part][name] = tensor
        self._versions = {
            version: Parcel(sent["model"], sent["broadcast"], self._plan.narrow) for version, sent in parts.items()
        }


def _waves(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that can be asked together: from one version, no client twice; in a fixed order."""
    waves: dict[tuple[int, int], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: e.task):
        turn = sum(
            entry.client == e.client
            for (version, _), wave in waves.items()
            if version == entry.start_version
            for e in wave
        )
        waves.setdefault((entry.start_version, turn), []).append(entry)
    return [waves[key] for key in sorted(waves)]
