"""Buffered asynchronous training in simulated time (FedBuff: Nguyen et al., AISTATS 2022, algorithm 1).

C clients train at any time, each from the model version that was current when it began. Whenever `size` updates have
arrived, the server forms the next version from them and empties the buffer:

    w_{t+1} = w_t + eta / size * sum_i s(tau_i) Delta_i,   tau_i = t - (version that client i started from)

This module decides *which* updates these are; it needs the profiles, the work and the seed, but no model. Clients
are drawn uniformly among those that are ready and not training.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any, NamedTuple

from fedmm import seeding
from fedmm.config.devices import BufferConfig
from fedmm.engines.clock import Attempt, Spent, Work, attempt, deserted, draw, ready_at, restore_clock, start_clock
from fedmm.engines.devices import Fleet
from fedmm.errors import ConfigError, RunError

PATIENCE = 100
"""Fruitless tasks in a row, as a multiple of the fleet's size, after which a run is given up."""


def staleness_weight(tau: int, config: BufferConfig) -> float:
    """s(tau) of an update `tau` versions old (FedAsync, Xie et al., 2019); s(0) = 1."""
    a, b = config.exponent, config.grace
    table: dict[str, float] = {
        "constant": 1.0,
        "polynomial": (1.0 + tau) ** -a,
        "hinge": 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0),
    }
    return table[config.staleness]


@dataclass(frozen=True)
class Entry:
    """An update in the buffer.

    Attributes:
        task: Running number of the task; unlike client and version it never repeats, so that random streams of the
            training hang on it.
        client: Partition index.
        start_version: Model version that it trained from.
        staleness: Versions made since.
        weight: s(staleness), not normalised.
        arrival_s: When it arrived.
    """

    task: int
    client: int
    start_version: int
    staleness: int
    weight: float
    arrival_s: float


@dataclass(frozen=True)
class Aggregation:
    """A step of the server.

    Attributes:
        version: Of the model that it makes; the initial model has version 0.
        at_s: Simulated time.
        entries: The buffer, in order of arrival.
        failed: (client, fate) of the tasks that came to nothing since the last step.
        spent: Bytes and energy of the tasks that ended since the last step.
    """

    version: int
    at_s: float
    entries: tuple[Entry, ...]
    failed: tuple[tuple[int, str], ...]
    spent: Spent


class _Flight(NamedTuple):
    """A task under way; flights order by end, ties by client."""

    end_s: float
    client: int
    task: int
    start_version: int
    outcome: Attempt


class BufferedRun:
    """The event queue of a buffered run: an endless iterator over its `Aggregation`s.

    Args:
        fleet: Profiles.
        work: Client that has data -> its task.
        config: Buffer, concurrency and staleness.
        seed: The run's seed.
        deadline_s: Simulated seconds after which a task is given up.

    Attributes:
        version: Current model version.
        clock: Simulated time and batteries.

    Raises:
        ConfigError: More concurrent clients are wanted than there are.
    """

    def __init__(
        self,
        fleet: Fleet,
        work: Mapping[int, Work],
        config: BufferConfig,
        seed: int,
        deadline_s: float | None = None,
    ) -> None:
        if config.concurrency > len(work):
            raise ConfigError(
                f"{config.concurrency} clients are to train at a time, but only {len(work)} have data",
                where="devices.buffer.concurrency",
                remedy=f"set it to at most {len(work)}",
            )
        self._fleet, self._work, self._config, self._seed = fleet, dict(sorted(work.items())), config, seed
        self._patience_s = inf if deadline_s is None else deadline_s
        self.version = 0
        self.clock = start_clock(fleet)
        self._tasks = 0
        self._flying: list[_Flight] = []

    def __iter__(self) -> Iterator[Aggregation]:
        return self

    def __next__(self) -> Aggregation:
        """Run on until the buffer is full.

        Raises:
            RunError: No device will ever be ready again, or all tasks fail.
        """
        buffer: list[Entry] = []
        failed: list[tuple[int, str]] = []
        spent, fruitless = Spent(), 0
        while len(buffer) < self._config.size:
            flight = self._next_end()
            self.clock = replace(self.clock, now_s=flight.end_s)
            self.clock = draw(
                self.clock, self._fleet, flight.client, flight.outcome.start_s, flight.outcome.spent.energy_j
            )
            spent += flight.outcome.spent
            if flight.outcome.fate == "reply":
                buffer.append(self._entry(flight))
                fruitless = 0
                continue
            failed.append((flight.client, flight.outcome.fate))
            fruitless += 1
            if fruitless >= PATIENCE * len(self._work):
                raise RunError(
                    f"{fruitless} tasks in a row came to nothing, the last one: {flight.outcome.fate}",
                    where=f"model version {self.version}",
                    remedy="raise devices.deadline_s, or lower dropout",
                )
        self.version += 1
        return Aggregation(self.version, self.clock.now_s, tuple(buffer), tuple(failed), spent)

    def versions_in_use(self) -> frozenset[int]:
        """Model versions that tasks under way started from, and the current one: those to keep."""
        return frozenset({f.start_version for f in self._flying if f.outcome.fate == "reply"} | {self.version})

    def state(self) -> dict[str, Any]:
        """As plain values, for the checkpoint; complete between two steps."""
        return {
            "version": self.version,
            "clock": self.clock.state(),
            "tasks": self._tasks,
            "flying": [[f.task, f.start_version, asdict(f.outcome)] for f in sorted(self._flying)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's `state`."""
        self.version, self._tasks = int(state["version"]), int(state["tasks"])
        self.clock = restore_clock(state["clock"])
        self._flying = []
        for task, version, raw in state["flying"]:
            outcome = Attempt(**{**raw, "spent": Spent(**raw["spent"])})
            heapq.heappush(self._flying, _Flight(outcome.end_s, outcome.client, task, version, outcome))

    def _entry(self, flight: _Flight) -> Entry:
        tau = self.version - flight.start_version
        weight = staleness_weight(tau, self._config)
        return Entry(flight.task, flight.client, flight.start_version, tau, weight, flight.end_s)

    def _next_end(self) -> _Flight:
        """Fill the free places, waiting for devices to come where nobody is ready, until a task ends."""
        while True:
            wake_s = self._fill()
            end_s = self._flying[0].end_s if self._flying else inf
            if end_s <= wake_s and self._flying:
                return heapq.heappop(self._flying)
            if wake_s == inf:
                raise deserted(self.clock.now_s)
            self.clock = replace(self.clock, now_s=wake_s)

    def _fill(self) -> float:
        """Start tasks on ready clients; return when the next idle one is ready, infinite if no place is free."""
        if len(self._flying) >= self._config.concurrency:
            return inf
        busy, now_s = {f.client for f in self._flying}, self.clock.now_s
        when = {k: ready_at(self.clock, self._fleet, k, now_s) for k in self._work if k not in busy}
        ready = [k for k, at in when.items() if at <= now_s]
        while len(self._flying) < self._config.concurrency:
            if not ready:
                return min((at for at in when.values() if at > now_s), default=inf)
            choice = seeding.numpy_rng(self._seed, "async", self._tasks).integers(len(ready))
            self._start(ready.pop(int(choice)))
        return inf

    def _start(self, client: int) -> None:
        now_s = self.clock.now_s
        outcome = attempt(
            self.clock,
            self._fleet,
            client,
            self._work[client],
            self._seed,
            self._tasks,
            now_s,
            now_s + self._patience_s,
        )
        heapq.heappush(self._flying, _Flight(outcome.end_s, client, self._tasks, self.version, outcome))
        self._tasks += 1
