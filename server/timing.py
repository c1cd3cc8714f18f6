"""The simulated time of a run: which devices are there, whose reply comes in time, and what a round costs them.

A round's timing needs no training (`fedmm.engines.clock`): it is known before anybody is asked, so that only clients
whose reply counts are trained at all. Evaluations and selectors' questions take no simulated time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import inf, prod
from typing import Any, NamedTuple

from fedmm.config.devices import DevicesConfig
from fedmm.engines.clock import (
    Leg,
    Reading,
    Spent,
    Work,
    ask_count,
    check_in,
    draw,
    legs,
    restore_clock,
    simulate_round,
    start_clock,
    time_to_accuracy,
)
from fedmm.engines.costs import training_flops
from fedmm.engines.devices import Fleet
from fedmm.io.run_directory import Row
from fedmm.models import bytes_per_block
from fedmm.models.width import hidden_width
from fedmm.wire import Terms
from server.admission import Expected
from server.plan import Plan
from server.policy import Event
from server.selection import Pick
from server.session import Parcel

_FATES: Mapping[str, str] = {
    "straggler": "under way when enough replies were there, or the time was over",
    "dropout": "dropped out",
    "battery": "battery ran empty",
    "interrupted": "left and lost the task",
    "unavailable": "never came back",
    "late": "no reply within devices.deadline_s",
}
"""What happened to a task without a reply."""


class Chosen(NamedTuple):
    """What a synchronous round comes to in simulated time.

    Attributes:
        picks: Clients whose reply counts.
        events: What became of the others.
        rows: Figures of the round.
    """

    picks: list[Pick]
    events: list[Event]
    rows: list[Row]


class Timing:
    """Clock, devices and cost of one run.

    Args:
        plan: The run, with its fleet.
        devices: The `devices` section.
        samples: Training samples of each client.

    Attributes:
        fleet: Profile of each client.
        terms: Of clients whose device trains otherwise than `train` says.
        clock: Simulated time and batteries.
        spent: Bytes and energy of all tasks so far.
        records: Validations that were better than every earlier one.
    """

    def __init__(self, plan: Plan, devices: DevicesConfig, samples: Sequence[int]) -> None:
        self.fleet: Fleet = plan.fleet
        self._plan, self._devices, self._samples = plan, devices, samples
        self._flops: dict[tuple[tuple[str, ...], int | None], int] = {}
        self.terms = {k: terms for k, terms in enumerate(own_terms(plan)) if terms != Terms()}
        self.clock = start_clock(self.fleet)
        self.spent = Spent()
        self.records: list[Reading] = []

    # -- rounds -------------------------------------------------------------------------------------------------

    def candidates(self, allowed: Sequence[int], wanted: int) -> tuple[tuple[int, ...], int]:
        """Wait until enough devices have checked in; those that have, and how many of them to ask."""
        self.clock, there = check_in(
            self.clock, self.fleet, allowed, ask_count(wanted, self._devices.over_selection, len(allowed))
        )
        return tuple(there), ask_count(wanted, self._devices.over_selection, len(there))

    def round(
        self, picks: Sequence[Pick], wanted: int, round: int, parcel: Parcel, expected: Callable[[Pick], Expected]
    ) -> Chosen:
        """Let a round pass.

        Args:
            picks: Who is asked.
            wanted: Replies that are waited for.
            round: From 1.
            parcel: What they are sent.
            expected: What their replies hold.
        """
        work = {p.client: self.work(p, parcel, expected(p), self._plan.config.train.local_epochs) for p in picks}
        seed, deadline = self._plan.config.seed, self._devices.deadline_s
        self.clock, timing = simulate_round(self.clock, self.fleet, work, wanted, seed, round, deadline)
        failed = [(k, "straggler") for k in timing.stragglers] + list(timing.failed.items())
        rows = [
            row(round, "stragglers", len(timing.stragglers)),
            row(round, "dropouts", len(timing.failed)),
            *self.passed(round, timing.spent),
        ]
        return Chosen([p for p in picks if p.client in timing.arrival_s], failures(round, failed), rows)

    def bootstrap(self, picks: Sequence[Pick], parcel: Parcel, expected: Callable[[Pick], Expected]) -> list[Row]:
        """Let the bootstrap pass: one epoch of everybody. The server needs all, and waits for the slowest.

        Nobody drops out, as such a client would be asked again.
        """
        start_s, end_s, spent = self.clock.now_s, self.clock.now_s, Spent()
        for pick in picks:
            parts = legs(self.fleet[pick.client], self.work(pick, parcel, expected(pick), 1, own_epochs=False))
            done_s = self.fleet[pick.client].availability.after(start_s, sum(leg.seconds for leg in parts))
            end_s = max(end_s, done_s if done_s < inf else start_s)
            cost = _total(parts)
            self.clock, spent = draw(self.clock, self.fleet, pick.client, start_s, cost.energy_j), spent + cost
        self.clock = replace(self.clock, now_s=end_s)
        return self.passed(0, spent)

    def passed(self, round: int, spent: Spent) -> list[Row]:
        """Count what a round has cost, and say so."""
        self.spent += spent
        rows = [
            row(round, "simulated_seconds", self.clock.now_s),
            row(round, "simulated_bytes_down", spent.down_bytes),
            row(round, "simulated_bytes_up", spent.up_bytes),
        ]
        return rows + ([row(round, "simulated_energy_j", spent.energy_j)] if self.clock.charges else [])

    def work(self, pick: Pick, parcel: Parcel, expected: Expected, epochs: int, *, own_epochs: bool = True) -> Work:
        """What a task asks of a client's device."""
        terms = self.terms.get(pick.client, Terms())
        kind = pick.modalities, terms.width
        if kind not in self._flops:
            model = self._plan.model if terms.width is None else self._plan.narrow_model(terms.width)
            self._flops[kind] = training_flops(model, self._plan.dataset.specs, pick.modalities)
        up = sum(bytes_per_block(dict(expected.model)).values()) + sum(
            8 * prod(f.shape) for f in expected.report.values()
        )
        return Work(
            self._samples[pick.client],
            (terms.epochs or epochs) if own_epochs else epochs,
            self._flops[kind],
            sum(parcel.size(expected.owned, terms.width).values()),
            up,
        )

    # -- accounts -----------------------------------------------------------------------------------------------

    def validated(self, accuracy: float) -> None:
        """Keep a validation if it is the best so far: no other can be the first to reach any target."""
        if not self.records or accuracy > self.records[-1].accuracy:
            self.records.append(Reading(self.clock.now_s, self.spent.down_bytes + self.spent.up_bytes, accuracy))

    def summary(self) -> dict[str, Any]:
        """For the run's summary: time, bytes and energy, and what it took to reach each target."""
        reached = time_to_accuracy(self.records, self._devices.targets)
        return {
            "simulated_seconds": self.clock.now_s,
            "simulated_bytes_down": self.spent.down_bytes,
            "simulated_bytes_up": self.spent.up_bytes,
            "simulated_energy_j": self.spent.energy_j if self.clock.charges else None,
            "time_to_accuracy": {
                f"{target:g}": None if found is None else {"seconds": found.seconds, "bytes": found.bytes}
                for target, found in reached.items()
            },
        }

    def state(self) -> dict[str, Any]:
        """As plain values, for the checkpoint."""
        return {"clock": self.clock.state(), "spent": asdict(self.spent), "records": [list(r) for r in self.records]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's `state`."""
        self.clock, self.spent = restore_clock(state["clock"]), Spent(**state["spent"])
        self.records = [Reading(*r) for r in state["records"]]


def own_terms(plan: Plan) -> Iterator[Terms]:
    """The terms that each device of the fleet trains on."""
    for device in plan.fleet:
        low = device.precision if device.precision != "float32" else None
        width = hidden_width(plan.config.model, device.width)
        yield Terms(device.local_epochs, device.batch_size, low, width=width)


def failures(round: int, failed: Iterable[tuple[int, str]]) -> list[Event]:
    """What became of tasks without a reply, (client, fate); one event a fate, as in large rounds they are many."""
    by_fate: dict[str, list[int]] = {}
    for client, fate in failed:
        by_fate.setdefault(fate, []).append(client)
    return [
        Event(round, fate, None, f"{_FATES[fate]}: client {', '.join(map(str, sorted(k)))}", "left out of the round")
        for fate, k in sorted(by_fate.items())
    ]


def _total(parts: Sequence[Leg]) -> Spent:
    return sum((Spent(leg.down_bytes, leg.up_bytes, leg.energy_j) for leg in parts), Spent())


def row(round: int, metric: str, value: float) -> Row:
    """A figure of a whole round."""
    return Row(round, "train", "global", None, "fused", metric, float(value))
