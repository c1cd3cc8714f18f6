"""The virtual clock: how long tasks and rounds take on the devices of a fleet, in simulated seconds.

Everything here is a function of the profiles, the work, the seed and the round: real time plays no part, and no
model is needed, so that a server knows who will be late before it trains anybody.

    seconds of a task = down bytes / down rate + samples epochs FLOPs / speed + up bytes / up rate

plus, where the device is not always there, the waiting for its windows (`Availability`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any, Literal, NamedTuple, TypeAlias

from fedmm import seeding
from fedmm.engines.devices import DeviceProfile, Fleet
from fedmm.errors import RunError

Fate: TypeAlias = Literal["reply", "dropout", "battery", "interrupted", "unavailable", "late"]
"""How a task ends: with a reply; the client drops out; its battery is empty; it leaves and loses the task; it never
comes back; the time is over."""


@dataclass(frozen=True)
class Work:
    """What a task asks of a device.

    Attributes:
        samples: Training samples of the client.
        epochs: Passes over them.
        flops_sample: Operations of one sample's training (`fedmm.engines.costs.training_flops`).
        down_bytes: Bytes that the client is sent.
        up_bytes: Bytes that it sends.
    """

    samples: int
    epochs: int
    flops_sample: float
    down_bytes: int
    up_bytes: int


@dataclass(frozen=True)
class Spent:
    """Bytes and energy that tasks have used, fruitless ones among them."""

    down_bytes: int = 0
    up_bytes: int = 0
    energy_j: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.down_bytes + other.down_bytes, self.up_bytes + other.up_bytes, self.energy_j + other.energy_j)


class Leg(NamedTuple):
    """A part of a task: receiving, computing or sending."""

    seconds: float
    down_bytes: int
    up_bytes: int
    energy_j: float


def legs(profile: DeviceProfile, work: Work) -> tuple[Leg, Leg, Leg]:
    """The parts of a task on a device, in order: receive, compute, send."""
    compute = work.samples * work.epochs * work.flops_sample / profile.flops_s
    compute_w = profile.battery.compute_w if profile.battery else 0.0
    radio = profile.battery.radio_j_byte if profile.battery else 0.0
    return (
        Leg(work.down_bytes / profile.down_bytes_s, work.down_bytes, 0, work.down_bytes * radio),
        Leg(compute, 0, 0, compute * compute_w),
        Leg(work.up_bytes / profile.up_bytes_s, 0, work.up_bytes, work.up_bytes * radio),
    )


def task_seconds(profile: DeviceProfile, work: Work) -> float:
    """Seconds that a task takes on a device that stays available."""
    return sum(leg.seconds for leg in legs(profile, work))


def progress(parts: Sequence[Leg], active_s: float) -> Spent:
    """What a task has used after `active_s` seconds of work on it."""
    spent = Spent()
    for leg in parts:
        share = 1.0 if leg.seconds <= active_s else active_s / leg.seconds
        spent += Spent(round(share * leg.down_bytes), round(share * leg.up_bytes), share * leg.energy_j)
        active_s = max(0.0, active_s - leg.seconds)
    return spent


def lasts(parts: Sequence[Leg], energy_j: float) -> float:
    """Seconds of work on a task until `energy_j` is used up; infinite if it suffices."""
    seconds = 0.0
    for leg in parts:
        if leg.energy_j > energy_j:
            return seconds + leg.seconds * energy_j / leg.energy_j
        seconds, energy_j = seconds + leg.seconds, energy_j - leg.energy_j
    return inf


# -- batteries and readiness --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Simulated time and what is left in the batteries; a value, so that a checkpoint is its `state`.

    Attributes:
        now_s: Simulated seconds since the start of the run.
        charges: Client with a battery -> (joules, time at which it held them).
    """

    now_s: float
    charges: Mapping[int, tuple[float, float]]

    def state(self) -> dict[str, Any]:
        """As plain values, for the checkpoint."""
        return {"now_s": self.now_s, "charges": {str(k): list(charge) for k, charge in self.charges.items()}}


def start_clock(fleet: Fleet) -> Clock:
    """The clock at the start of a run: time 0, batteries at their initial charge."""
    return Clock(0.0, {k: (p.battery.initial_j, 0.0) for k, p in enumerate(fleet) if p.battery})


def restore_clock(state: Mapping[str, Any]) -> Clock:
    """The clock that `Clock.state` described."""
    charges = {int(k): (float(level), float(at)) for k, (level, at) in state["charges"].items()}
    return Clock(float(state["now_s"]), charges)


def level_j(clock: Clock, fleet: Fleet, client: int, at_s: float) -> float:
    """Joules in a client's battery at a time not before its last task; it charges while the device is away."""
    battery = fleet[client].battery
    if battery is None:
        return inf
    held, since = clock.charges[client]
    away = at_s - since - fleet[client].availability.seconds(since, at_s)
    return min(battery.capacity_j, held + battery.recharge_w * away)


def draw(clock: Clock, fleet: Fleet, client: int, start_s: float, energy_j: float) -> Clock:
    """The clock after a task that began at `start_s` and took `energy_j` from the client's battery.

    The energy counts as taken at once; the pauses of the task then charge the battery again.
    """
    if client not in clock.charges:
        return clock
    left = max(0.0, level_j(clock, fleet, client, start_s) - energy_j)
    return replace(clock, charges={**clock.charges, client: (left, start_s)})


def ready_at(clock: Clock, fleet: Fleet, client: int, now_s: float) -> float:
    """When a client can take a task, at the earliest: it is there, and its battery is above the reserve."""
    profile, battery = fleet[client], fleet[client].battery
    charged = now_s
    if battery is not None:
        short = battery.reserve_j - level_j(clock, fleet, client, now_s)
        if short > 1e-9 * battery.capacity_j:  # not a rounding error
            if battery.recharge_w == 0:
                return inf
            charged = profile.availability.absent(now_s, short / battery.recharge_w)
    return profile.availability.after(charged, 0) if charged < inf else inf


def check_in(clock: Clock, fleet: Fleet, clients: Sequence[int], least: int) -> tuple[Clock, list[int]]:
    """Wait until `least` of the clients have checked in, and list all that have by then.

    A client checks in when it is ready, and stays on the list. If fewer than `least` ever come, the server goes on
    with those.

    Raises:
        RunError: None of the clients ever comes.
    """
    when = {k: ready_at(clock, fleet, k, clock.now_s) for k in clients}
    coming = sorted(t for t in when.values() if t < inf)
    if not coming:
        raise deserted(clock.now_s)
    now_s = max(clock.now_s, coming[min(max(least, 1), len(coming)) - 1])
    return replace(clock, now_s=now_s), [k for k in clients if when[k] <= now_s]


def deserted(now_s: float) -> RunError:
    """The error of a run whose devices are all gone for good."""
    return RunError(
        "no device will ever be ready again",
        where=f"simulated second {now_s:.0f}",
        remedy="give traces a period_s, and batteries a recharge_w and an availability with gaps to charge in",
    )


# -- one task -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One task on one device.

    Attributes:
        client: Partition index.
        start_s: When the server sent it.
        end_s: When the reply arrived, or the task came to nothing.
        fate: How it ended.
        spent: Bytes and energy that it used.
    """

    client: int
    start_s: float
    end_s: float
    fate: Fate
    spent: Spent


def attempt(
    clock: Clock, fleet: Fleet, client: int, work: Work, seed: int, number: int, start_s: float, until_s: float = inf
) -> Attempt:
    """Follow a task from `start_s` until it ends, or until `until_s`, when the server gives it up.

    Args:
        clock: For the battery.
        fleet: Profiles.
        client: Who.
        work: What.
        seed: The run's seed; whether and when the client drops out is drawn from stream "dropout", `number`, client.
        number: Round, or running number of the task.
        start_s: When it is sent; the device begins once it is there.
        until_s: The server's patience; a task still under way is "late".
    """
    profile = fleet[client]
    parts, there = legs(profile, work), profile.availability
    whole = sum(leg.seconds for leg in parts)
    begin = there.after(start_s, 0)
    if begin == inf:
        return Attempt(client, start_s, start_s, "unavailable", Spent())
    ends: list[tuple[float, Fate]] = [(whole, "reply"), (lasts(parts, level_j(clock, fleet, client, begin)), "battery")]
    drops, share = seeding.numpy_rng(seed, "dropout", number, client).random(2)
    if drops < profile.dropout:
        ends.append((float(share) * whole, "dropout"))
    if not there.resumes:
        ends.append((there.until(begin) - begin, "interrupted"))
    active, fate = min(ends, key=lambda end: end[0])
    end_s = there.after(start_s, active)
    if end_s == inf:  # a trace that ends for good
        end_s = there.phase_s + there.windows_s[-1][1]
        active, fate = there.seconds(start_s, end_s), "interrupted"
    if end_s > until_s:
        active, end_s, fate = there.seconds(start_s, until_s), until_s, "late"
    return Attempt(client, start_s, end_s, fate, progress(parts, active))


# -- one synchronous round ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundTiming:
    """A synchronous round in simulated time.

    Attributes:
        start_s: When the tasks were sent.
        end_s: When the server stopped waiting.
        replies: Clients whose replies count, in order of arrival; at most the wanted number.
        stragglers: Clients still under way at the end, or one too many, ascending.
        failed: Client -> why no reply would ever have come.
        arrival_s: Client in `replies` -> when its reply arrived.
        spent: Bytes and energy of all that were asked.
    """

    start_s: float
    end_s: float
    replies: tuple[int, ...]
    stragglers: tuple[int, ...]
    failed: Mapping[int, Fate]
    arrival_s: Mapping[int, float]
    spent: Spent


def ask_count(wanted: int, over_selection: float, candidates: int) -> int:
    """How many clients to ask for `wanted` replies: over_selection x wanted, rounded up, at most all candidates."""
    return min(candidates, ceil(over_selection * wanted - 1e-9))


def simulate_round(
    clock: Clock,
    fleet: Fleet,
    work: Mapping[int, Work],
    wanted: int,
    seed: int,
    round: int,
    deadline_s: float | None = None,
) -> tuple[Clock, RoundTiming]:
    """Who replies in a round that begins now, and when it ends (Bonawitz et al., MLSys 2019).

    The round ends with the wanted-th reply or at the deadline, whichever is first: a failed client says nothing.
    Without a deadline, a round that falls short ends when the last client has replied or failed. Stragglers stop then.

    Args:
        clock: At the round's start.
        fleet: Profiles.
        work: Client that is asked -> its task.
        wanted: Replies after which the server waits no longer.
        seed: The run's seed.
        round: From 1.
        deadline_s: Simulated seconds that the round may take.

    Returns:
        The clock at the round's end, and the round.
    """
    start_s = clock.now_s
    limit_s = inf if deadline_s is None else start_s + deadline_s

    def follow(until_s: float) -> list[Attempt]:
        return [attempt(clock, fleet, k, work[k], seed, round, start_s, until_s) for k in sorted(work)]

    tries = follow(limit_s)
    arrivals = sorted((t.end_s, t.client) for t in tries if t.fate == "reply")[:wanted]
    if len(arrivals) == wanted and arrivals:
        end_s = arrivals[-1][0]
    else:
        end_s = max([start_s, *(t.end_s for t in tries)]) if deadline_s is None else limit_s
    tries = follow(end_s)
    replies = tuple(k for _, k in arrivals)
    others = {t.client: t.fate for t in tries if t.client not in replies}
    for t in tries:
        clock = draw(clock, fleet, t.client, start_s, t.spent.energy_j)
    return replace(clock, now_s=end_s), RoundTiming(
        start_s,
        end_s,
        replies,
        tuple(k for k, fate in others.items() if fate in ("late", "reply")),
        {k: fate for k, fate in others.items() if fate not in ("late", "reply")},
        {k: at for at, k in arrivals},
        sum((t.spent for t in tries), Spent()),
    )


# -- time to accuracy ---------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """Accuracy of the global model at a simulated time, and the bytes spent until then (up and down)."""

    seconds: float
    bytes: int
    accuracy: float


def time_to_accuracy(readings: Sequence[Reading], targets: Sequence[float]) -> dict[float, Reading | None]:
    """For each target the first reading, in order of time, whose accuracy reaches it; None if none does."""
    ordered = sorted(readings, key=lambda r: r.seconds)
    return {target: next((r for r in ordered if r.accuracy >= target), None) for target in targets}
