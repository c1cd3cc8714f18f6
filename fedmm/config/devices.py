"""The `devices` section: who computes how fast, over which link, when, and how the server waits in simulated time.

    devices:
      classes: {phone: {share: 0.7, dropout: 0.1}, gateway: 0.3}
      spread: 0.3
      deadline_s: 120
      over_selection: 1.3

What a class leaves out comes from the preset that it is like (`fedmm.engines.devices.PRESETS`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fedmm.config.section import Section


class AvailabilityConfig(Section):
    """When a device is there; seconds of simulated time.

    Attributes:
        kind: always; duty (on for `share` of each period); trace (on in the windows alone).
        period_s: Length of a period; a trace without one is not repeated. A duty cycle's default is a day.
        share: Share of the period that a duty cycle is on.
        phase_s: When the first period begins (null: drawn for each device of a duty cycle, 0 for a trace).
        windows_s: [begin, end) of each window of a trace, ascending and apart.
        interrupted: A task that the device's leaving cuts short: "resume" in the next window, or "lost".
    """

    kind: Literal["always", "duty", "trace"] = "always"
    period_s: PositiveFloat | None = None
    share: float = Field(default=0.5, gt=0, le=1)
    phase_s: float | None = None
    windows_s: list[list[float]] = Field(default_factory=list)
    interrupted: Literal["resume", "lost"] = "resume"

    @model_validator(mode="after")
    def _proper_windows(self) -> AvailabilityConfig:
        if self.windows_s and self.kind != "trace":
            raise ValueError(f"windows_s belong to kind: trace, not to {self.kind}")
        if self.kind != "trace":
            return self
        times = [t for window in self.windows_s for t in window]
        pairs = all(len(window) == 2 and window[0] < window[1] for window in self.windows_s)
        if not times or not pairs or times != sorted(times) or times[0] < 0:
            raise ValueError("windows_s must be pairs [begin, end) of seconds >= 0, ascending and not overlapping")
        if self.period_s is not None and times[-1] > self.period_s:
            raise ValueError(f"windows_s end at {times[-1]}, after the period of {self.period_s}")
        return self


class BatteryConfig(Section):
    """A battery; without one a device runs for ever.

    Attributes:
        capacity_j: Joules when full.
        compute_w: Joules per second of computing.
        radio_j_byte: Joules per byte sent or received.
        recharge_w: Joules per second while the device is unavailable.
        reserve: Share of the capacity below which the device takes no task; above 0, as an empty one takes none.
        initial: Share of the capacity at the start.
    """

    capacity_j: PositiveFloat
    compute_w: float = Field(default=3.0, ge=0)
    radio_j_byte: float = Field(default=2e-6, ge=0)
    recharge_w: float = Field(default=10.0, ge=0)
    reserve: float = Field(default=0.1, gt=0, lt=1)
    initial: float = Field(default=1.0, gt=0, le=1)


class TraitsConfig(Section):
    """What a device is like; null = as its preset, or class.

    Attributes:
        flops_s: Floating-point operations per second that training really gets.
        memory_bytes: Memory that training may fill.
        up_bytes_s: Bytes per second to the server.
        down_bytes_s: Bytes per second from the server.
        dropout: Probability that a task ends without a reply.
        local_epochs: Instead of train.local_epochs.
        batch_size: Instead of train.batch_size.
        precision: Number format of local training.
        width: Share of the model's width that the device trains (HeteroFL).
    """

    flops_s: PositiveFloat | None = None
    memory_bytes: PositiveInt | None = None
    up_bytes_s: PositiveFloat | None = None
    down_bytes_s: PositiveFloat | None = None
    availability: AvailabilityConfig | None = None
    dropout: float | None = Field(default=None, ge=0, lt=1)
    battery: BatteryConfig | None = None
    local_epochs: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    precision: Literal["float32", "bfloat16"] | None = None
    width: float | None = Field(default=None, gt=0, le=1)

    @field_validator("availability", mode="before")
    @classmethod
    def _kind_alone(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


class DeviceClassConfig(TraitsConfig):
    """A class of devices.

    Attributes:
        like: Preset that gives what is left out (null: the preset of the class's own name, if there is one).
        share: Share of the clients; all classes give one, or none does and all are equal.
        count: Number of clients; if one class gives it, all do.
        spread: Instead of devices.spread.
    """

    like: str | None = None
    share: float | None = Field(default=None, ge=0, le=1)
    count: int | None = Field(default=None, ge=0)
    spread: float | None = Field(default=None, ge=0)


class ClientDeviceConfig(TraitsConfig):
    """One client's device.

    Attributes:
        client: Partition index.
        device: Class or preset; such a client stands outside the classes' shares and counts, and is exactly as its
            class says, without spread (null: drawn like the others, then changed).
    """

    client: int = Field(ge=0)
    device: str | None = None


class BufferConfig(Section):
    """Buffered asynchronous aggregation (FedBuff, Nguyen et al., AISTATS 2022).

    Attributes:
        size: Updates that make a new version of the model.
        concurrency: Clients that train at any time.
        staleness: Weight of an update that is tau versions old (FedAsync, Xie et al., 2019): polynomial
            (1 + tau)^-a; hinge 1 up to tau = b, then 1 / (a (tau - b) + 1); constant 1.
        exponent: a.
        grace: b.
    """

    size: PositiveInt = 10
    concurrency: PositiveInt = 20
    staleness: Literal["polynomial", "hinge", "constant"] = "polynomial"
    exponent: PositiveFloat = 0.5
    grace: int = Field(default=4, ge=0)


class DevicesConfig(Section):
    """Heterogeneous devices and the virtual clock.

    Attributes:
        classes: Name -> class; a fraction stands for a share, a whole number for a count.
        clients: Single clients that differ.
        spread: Standard deviation of the logarithm of speed and link rates around their class's figures.
        mode: synchronous (rounds) or buffered (a new version whenever the buffer is full).
        deadline_s: Simulated seconds that a round, or in buffered mode a task, may take (null: no limit).
        over_selection: Synchronous: clients asked per reply that is wanted; the round ends with the last wanted one.
        buffer: Of buffered mode.
        targets: Validation accuracies for which the summary says what reaching them took.
    """

    classes: dict[str, DeviceClassConfig] = Field(default_factory=dict)
    clients: list[ClientDeviceConfig] = Field(default_factory=list)
    spread: float = Field(default=0.0, ge=0)
    mode: Literal["synchronous", "buffered"] = "synchronous"
    deadline_s: PositiveFloat | None = None
    over_selection: float = Field(default=1.0, ge=1)
    buffer: BufferConfig = BufferConfig()
    targets: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.5, 0.6, 0.7, 0.8, 0.9])

    @field_validator("classes", mode="before")
    @classmethod
    def _number_alone(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        keys: dict[type, str] = {int: "count", float: "share"}
        return {name: {keys[type(of)]: of} if type(of) in keys else of for name, of in value.items()}

    @model_validator(mode="after")
    def _one_measure(self) -> DevicesConfig:
        classes = self.classes.values()
        shares = [c.share for c in classes if c.share is not None]
        counts = [c.count for c in classes if c.count is not None]
        if (shares and counts) or len(shares) not in (0, len(classes)) or len(counts) not in (0, len(classes)):
            raise ValueError("give every class a share, or every class a count, or neither")
        if shares and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares of the classes sum to {sum(shares):g}, not to 1")
        named = [entry.client for entry in self.clients]
        if len(set(named)) < len(named):
            raise ValueError("a client stands twice in clients; keep one of its entries")
        return self
