"""Device profiles: what a client's hardware can do, from the configuration and a seeded generator.

Orders of magnitude of the presets, with where they come from:

| Preset    | FLOP/s | memory | down, up      | dropout | Basis                                                      |
|-----------|--------|--------|---------------|---------|------------------------------------------------------------|
| `phone`   | 10 G   | 1 GiB  | 60, 11 Mbit/s | 8 %     | CPU of a mid-range phone; one app's memory; mobile network |
| `tablet`  | 20 G   | 2 GiB  | 60, 25 Mbit/s | 5 %     | CPU of a tablet; Wi-Fi shared on a fixed line              |
| `gateway` | 100 G  | 4 GiB  | 95, 48 Mbit/s | 1 %     | embedded GPU, a fifth of its 472 GFLOP/s; fixed line       |

Speeds are what small-batch training gets, a tenth or so of the peak. Link rates are the medians of public speed tests
of the mid-2020s (mobile and fixed). Of phones, 6 to 10 % dropped out of a round in a large deployment (Bonawitz et
al., MLSys 2019). Presets are always available and have no battery, since both depend on the study; typical figures
are a daily duty cycle with share 0.3 to 0.4, and for a phone of 4500 mAh a battery of 62 kJ, 3 W for computing, and
2e-6 J/byte, as of Wi-Fi uploads (Huang et al., MobiSys 2012).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, floor, inf, isinf
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from fedmm import seeding
from fedmm.config.devices import AvailabilityConfig, BatteryConfig, DeviceClassConfig, DevicesConfig, TraitsConfig
from fedmm.errors import ConfigError, nearest

Precision: TypeAlias = Literal["float32", "bfloat16"]

DAY_S = 86_400.0
MBIT = 1e6 / 8
GIB = 1024**3

_TOUCH_S = 1e-6
"""Windows this close are one: the end of a period and the begin of the next differ by rounding."""


@dataclass(frozen=True)
class Availability:
    """When a device is there, in seconds of simulated time.

    Attributes:
        windows_s: [begin, end) within one period, ascending and apart.
        period_s: After which the windows repeat; infinite: never.
        phase_s: Begin of a period.
        resumes: Whether a task that the end of a window cuts short goes on in the next one, or is lost.
    """

    windows_s: tuple[tuple[float, float], ...] = ((0.0, inf),)
    period_s: float = inf
    phase_s: float = 0.0
    resumes: bool = True

    def windows(self, from_s: float) -> Iterator[tuple[float, float]]:
        """The windows that end after `from_s`, in order."""
        once = isinf(self.period_s)
        # One period early, in case the quotient was rounded up.
        cycle = 0 if once else floor((from_s - self.phase_s) / self.period_s) - 1
        while True:
            shift = self.phase_s if once else self.phase_s + cycle * self.period_s
            for begin, end in self.windows_s:
                if end + shift > from_s:
                    yield begin + shift, end + shift
            if once:
                return
            cycle += 1

    def after(self, start_s: float, active_s: float) -> float:
        """When `active_s` seconds of availability have passed since `start_s`; infinite if they never do.

        With zero seconds: when the device is there next.
        """
        begin, end = self.windows_s[-1]
        if end == inf and start_s >= self.phase_s + begin:  # there for good, as most devices are
            return start_s + active_s
        left = active_s
        for begin, end in self.windows(start_s):
            here = max(begin, start_s)
            if end - here >= left:
                return here + left
            left -= end - here
        return inf

    def until(self, start_s: float) -> float:
        """End of the unbroken availability that begins at or after `start_s`; infinite if it has none."""
        first = reach = self.after(start_s, 0)
        for begin, end in self.windows(first):
            if begin > reach + _TOUCH_S:
                break
            reach = end
            if reach >= first + self.period_s:
                return inf
        return reach

    def absent(self, start_s: float, off_s: float) -> float:
        """When `off_s` seconds without the device have passed since `start_s`; infinite if they never do."""
        if sum(end - begin for begin, end in self.windows_s) >= self.period_s - _TOUCH_S:
            return inf
        here, left = start_s, off_s
        for begin, end in self.windows(start_s):
            if begin - here >= left:
                break
            left -= max(begin - here, 0.0)
            here = end
        return here + left

    def seconds(self, start_s: float, end_s: float) -> float:
        """Seconds of availability in [start, end)."""
        total = 0.0
        for begin, end in self.windows(start_s):
            if begin >= end_s:
                break
            total += min(end, end_s) - max(begin, start_s)
        return total


@dataclass(frozen=True)
class Battery:
    """A battery; attributes as in `BatteryConfig`, the reserve and the initial charge in joules."""

    capacity_j: float
    compute_w: float
    radio_j_byte: float
    recharge_w: float
    reserve_j: float
    initial_j: float


@dataclass(frozen=True)
class DeviceProfile:
    """What one client's device can do.

    Attributes:
        device: Name of its class.
        flops_s: Effective floating-point operations per second.
        memory_bytes: Memory that training may fill.
        up_bytes_s: Bytes per second to the server.
        down_bytes_s: Bytes per second from the server.
        availability: When it is there.
        dropout: Probability that a task ends without a reply.
        battery: None: runs for ever.
        local_epochs: None: as the training schedule says.
        batch_size: None: as the training schedule says.
        precision: Number format of local training.
        width: Share of the model's width that it trains.
    """

    device: str
    flops_s: float
    memory_bytes: int
    up_bytes_s: float
    down_bytes_s: float
    availability: Availability = Availability()
    dropout: float = 0.0
    battery: Battery | None = None
    local_epochs: int | None = None
    batch_size: int | None = None
    precision: Precision = "float32"
    width: float = 1.0


Fleet: TypeAlias = Sequence[DeviceProfile]
"""Profile of each client, by partition index."""

PRESETS: Mapping[str, DeviceProfile] = MappingProxyType(
    {
        "phone": DeviceProfile("phone", 10e9, GIB, 11 * MBIT, 60 * MBIT, dropout=0.08),
        "tablet": DeviceProfile("tablet", 20e9, 2 * GIB, 25 * MBIT, 60 * MBIT, dropout=0.05),
        "gateway": DeviceProfile("gateway", 100e9, 4 * GIB, 48 * MBIT, 95 * MBIT, dropout=0.01),
    }
)

_NEEDED = ("flops_s", "memory_bytes", "up_bytes_s", "down_bytes_s")


def build_fleet(config: DevicesConfig, clients: int, seed: int) -> tuple[DeviceProfile, ...]:
    """The device of each client, the same for the same arguments.

    Classes are dealt in a random order, in the given shares (rounded by largest remainder) or counts; a client's own
    figures come from a stream of its own.

    Args:
        config: The `devices` section.
        clients: Number K of clients.
        seed: The run's seed.

    Raises:
        ConfigError: Unknown class or preset, missing figures, counts that do not add up, or no class at all.
    """
    own = {entry.client: entry for entry in config.clients}
    if outside := sorted(k for k in own if k >= clients):
        raise ConfigError(
            f"there is no client {outside[0]}", where="devices.clients", remedy=f"clients are 0 to {clients - 1}"
        )
    classes = {name: _with_base(name, of) for name, of in config.classes.items()}
    drawn = [k for k in range(clients) if k not in own or own[k].device is None]
    order = seeding.numpy_rng(seed, "devices").permutation(len(drawn))
    labels = _deal(config.classes, len(drawn))
    dealt = {drawn[at]: label for at, label in zip(order, labels, strict=True)}
    fleet = []
    for k in range(clients):
        name = dealt.get(k) or str(own[k].device)
        profile, traits = classes.get(name) or (_preset(name, f"devices.clients: client {k}", classes), TraitsConfig())
        spread = _spread(config, config.classes[name]) if k in dealt else 0.0
        fleet.append(_draw(profile, traits, own.get(k), spread, seed, k))
    return tuple(fleet)


def refuse_too_small(fleet: Fleet, need: Mapping[int, int]) -> None:
    """Refuse devices that cannot hold their training.

    Args:
        fleet: Profiles.
        need: Client -> bytes that its training needs (`fedmm.engines.costs.training_memory`).

    Raises:
        ConfigError: Names the clients, what they need and have, and the ways out.
    """
    small = [k for k in sorted(need) if need[k] > fleet[k].memory_bytes]
    if not small:
        return
    shown = [f"client {k} ({fleet[k].device}) needs {_mib(need[k])}, has {_mib(fleet[k].memory_bytes)}" for k in small]
    more = f"; and {len(small) - 5} more" if len(small) > 5 else ""
    raise ConfigError(
        f"{len(small)} of {len(fleet)} devices are too small for the model: {'; '.join(shown[:5])}{more}",
        where="devices",
        remedy="lower batch_size, set precision: bfloat16 or a width below 1, shrink the model, or raise memory_bytes",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _spread(config: DevicesConfig, of: DeviceClassConfig) -> float:
    return config.spread if of.spread is None else of.spread


def _preset(name: str, where: str, others: Iterable[str] = ()) -> DeviceProfile:
    if name not in PRESETS:
        raise ConfigError(f'unknown device "{name}"', where=where, remedy=nearest(name, {*PRESETS, *others}))
    return PRESETS[name]


def _with_base(name: str, of: DeviceClassConfig) -> tuple[DeviceProfile, TraitsConfig]:
    """The profile that a class starts from, under the class's name."""
    where = f"devices.classes.{name}"
    if of.like is not None or name in PRESETS:
        return replace(_preset(of.like or name, f"{where}.like"), device=name), of
    if missing := [key for key in _NEEDED if getattr(of, key) is None]:
        raise ConfigError(
            f"lacks {', '.join(missing)}", where=where, remedy=f"give them, or like: {', '.join(sorted(PRESETS))}"
        )
    return DeviceProfile(name, *(getattr(of, key) for key in _NEEDED)), of


def _deal(classes: Mapping[str, DeviceClassConfig], clients: int) -> list[str]:
    """One class name a client, in the classes' order: counts as given, shares by largest remainder."""
    if not classes and clients:
        raise ConfigError(
            f"{clients} clients have no device",
            where="devices.classes",
            remedy="write, e.g., {phone: 0.7, gateway: 0.3}",
        )
    counts = {name: of.count for name, of in classes.items() if of.count is not None}
    if not counts:
        exact = {n: clients * (1 / len(classes) if c.share is None else c.share) for n, c in classes.items()}
        # Rounded, so that 0.7 * 10 is 7 and not a little less.
        counts = {name: floor(round(value, 9)) for name, value in exact.items()}
        by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
        for name in by_rest[: clients - sum(counts.values())]:
            counts[name] += 1
    if sum(counts.values()) != clients:
        raise ConfigError(
            f"the classes count {sum(counts.values())} clients, but there are {clients} without a device of their own",
            where="devices.classes",
            remedy="correct the counts, or give shares",
        )
    return [name for name, count in counts.items() for _ in range(count)]


def _draw(
    base: DeviceProfile, of: TraitsConfig, own: TraitsConfig | None, spread: float, seed: int, client: int
) -> DeviceProfile:
    """One client's profile: class over base, log-normal spread around its rates, the client's own figures on top."""
    rng = seeding.numpy_rng(seed, "devices", client)
    speed, up, down = (exp(spread * z) for z in rng.standard_normal(3))
    position = float(rng.random())
    profile = _changed(base, of, position)
    profile = replace(
        profile,
        flops_s=profile.flops_s * speed,
        up_bytes_s=profile.up_bytes_s * up,
        down_bytes_s=profile.down_bytes_s * down,
    )
    return profile if own is None else _changed(profile, own, position)


def _changed(profile: DeviceProfile, traits: TraitsConfig, position: float) -> DeviceProfile:
    """`profile` with every trait that is given; `position` in [0, 1) places a duty cycle without a phase."""
    given: dict[str, Any] = {
        f.name: getattr(traits, f.name) for f in fields(profile) if getattr(traits, f.name, None) is not None
    }
    given.pop("device", None)
    if traits.availability is not None:
        given["availability"] = build_availability(traits.availability, position)
    if traits.battery is not None:
        given["battery"] = build_battery(traits.battery)
    return replace(profile, **given)


def build_availability(config: AvailabilityConfig, position: float = 0.0) -> Availability:
    """From the configuration; `position` in [0, 1) is where in its period a duty cycle without a phase begins."""
    resumes = config.interrupted == "resume"
    if config.kind == "trace":
        windows = tuple((begin, end) for begin, end in config.windows_s)
        return Availability(windows, config.period_s or inf, config.phase_s or 0.0, resumes)
    if config.kind == "always" or config.share == 1:  # a full cycle has no gap to wait for
        return Availability(resumes=resumes)
    period = config.period_s or DAY_S
    phase = position * period if config.phase_s is None else config.phase_s
    return Availability(((0.0, config.share * period),), period, phase, resumes)


def build_battery(config: BatteryConfig) -> Battery:
    """From the configuration, shares turned into joules."""
    return Battery(
        config.capacity_j,
        config.compute_w,
        config.radio_j_byte,
        config.recharge_w,
        config.reserve * config.capacity_j,
        config.initial * config.capacity_j,
    )
