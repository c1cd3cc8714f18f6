"""The configuration of a run and of a comparison, as pydantic models. Unknown keys are refused.

`load.py` reads YAML, applies method presets and `key=value` overrides, and turns pydantic's complaints
into a `ConfigError`. Names of plug-ins (objective, strategy, selection) are checked by the tables that own
them, since this library knows neither `clients/` nor `server/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedmm.config.devices import DevicesConfig
from fedmm.config.observe import ObserveConfig
from fedmm.config.section import Section


class Plugin(BaseModel):
    """A plug-in by name (or dotted path `package.module:Name`) with its own parameters beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The parameters given beside `name`."""
        return dict(self.model_extra or {})


def _short_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _short_data(value: object) -> object:
    if isinstance(value, str):
        name, _, preset = value.partition(":")
        # A dot says that it is the user's own function, package.module:function.
        return {"name": value, "preset": None} if "." in name else {"name": name, "preset": preset or None}
    return value


def _short_devices(value: object) -> object:
    return {"classes": {value: {}}} if isinstance(value, str) else value


def _short_modalities(value: object) -> object:
    return {"multimodal": value} if isinstance(value, int | float) else value


SHORTHANDS: dict[str, Callable[[object], object]] = {
    "data": _short_data,
    "scenario.partition": _short_name,
    "scenario.modalities": _short_modalities,
    "objective": _short_name,
    "strategy": _short_name,
    "selection": _short_name,
    "engine": _short_name,
    "devices": _short_devices,
}
"""Sections that may be written as one value: config path -> the mapping that the value stands for."""


class DataConfig(Section):
    """Which data set. `root` is a folder of the user's own files; `modalities` keeps a subset, in this order."""

    name: str = "avdigits"
    preset: str | None = None
    root: str | None = None
    modalities: list[str] | None = None
    samples: PositiveInt | None = None
    params: dict[str, Any] = Field(default_factory=dict)


class PartitionConfig(Section):
    """How training samples are spread over clients.

    Attributes:
        name: iid, dirichlet (labels, the papers' capped form), quantity (log-normal sizes), pathological
            (k classes a client), natural (the data set's own clients).
        alpha: Concentration for `dirichlet`; small = skewed.
        cap: Capped form: a client that holds more than cap x N/K samples takes no more of the later classes.
        sigma: Standard deviation of log sizes for `quantity`.
        classes_per_client: For `pathological`.
    """

    name: Literal["iid", "dirichlet", "quantity", "pathological", "natural"] = "dirichlet"
    alpha: PositiveFloat = 3.0
    cap: PositiveFloat = 1.1
    sigma: float = Field(default=1.0, ge=0)
    classes_per_client: PositiveInt = 2
    min_samples: PositiveInt = 2


class ModalityConfig(Section):
    """Who owns what.

    Attributes:
        multimodal: Share r of clients that own all modalities: floor(rK) do; the others own one each, in turn
            (the papers' `multi_ratio`).
        missing: Probability that a sample of a multimodal client lacks one modality; no sample loses all.
        heldout: "complete": validation and test samples keep every modality, as in the papers' protocol;
            "owned": they lack what their client lacks.
    """

    multimodal: float = Field(default=1.0, ge=0, le=1)
    missing: float = Field(default=0.0, ge=0, lt=1)
    heldout: Literal["complete", "owned"] = "complete"


class ScenarioConfig(Section):
    """Clients, how data are spread over them, and which modalities they own."""

    clients: PositiveInt = 20
    partition: PartitionConfig = PartitionConfig()
    modalities: ModalityConfig = ModalityConfig()

    @field_validator("partition", "modalities", mode="before")
    @classmethod
    def _shorthand(cls, value: object, info: ValidationInfo) -> object:
        return SHORTHANDS[f"scenario.{info.field_name}"](value)


class ProjectorConfig(Section):
    """Two-projector module of FedCMI.

    Attributes:
        depth: Linear layers with ReLU between; 0 = identity.
        hidden: Width between them (null: the features' width d).
        fill: What stands in for an absent modality at the fusion: the infiltration feature of what is present,
            or zeros (ablation).
    """

    depth: int = Field(default=3, ge=0)
    hidden: PositiveInt | None = None
    fill: Literal["infiltration", "zero"] = "infiltration"


class BoostingConfig(Section):
    """Boosted own heads of AUG.

    Attributes:
        slots: Most heads that a modality can gain; all are there, and are sent, from the start.
        hidden: Width of their first layers.
        fuse: Late fusion is the mean of the modalities' "logits", which grow with the number of heads, or of their
            "probabilities".
    """

    slots: PositiveInt = 4
    hidden: PositiveInt = 256
    fuse: Literal["logits", "probabilities"] = "logits"


class ModelConfig(Section):
    """The multimodal network.

    Attributes:
        encoder: "auto" picks by kind (cnn for images and spectrograms, text for hashed n-grams, mlp for vectors); or
            one name for all, or a mapping modality -> name. Names: mlp, cnn, convnet, text, resnet18, flat.
        features: Width d of each encoder's output.
        width: Hidden width of mlp/text; base channels of cnn/resnet18 (null: each encoder's default).
        norm: Normalisation of cnn and resnet18: group, batch, none.
        fusion: concat, sum, gated, film, mlp: of features, before the joint head; late: mean of the own heads' logits.
        projector: FedCMI's projectors; null = none (a method preset switches them on).
        unimodal_heads: One linear head a modality besides the joint head.
        boosting: AUG's heads in place of the linear ones, with late fusion; null = none.
    """

    encoder: str | dict[str, str] = "auto"
    features: PositiveInt = 64
    width: PositiveInt | None = None
    norm: Literal["group", "batch", "none"] = "group"
    fusion: Literal["concat", "sum", "gated", "film", "mlp", "late"] = "concat"
    projector: ProjectorConfig | None = None
    unimodal_heads: bool = False
    boosting: BoostingConfig | None = None

    @model_validator(mode="after")
    def _boosting_fuses_late(self) -> ModelConfig:
        if self.boosting is not None and (self.fusion != "late" or self.projector is not None):
            raise ValueError(
                "boosting needs fusion: late and projector: null, since it brings the heads that are fused"
            )
        return self


class TrainConfig(Section):
    """Local and global schedule.

    Attributes:
        lr_schedule: "constant", or "paper": lr until `lr_hold` rounds, then lr - (lr - lr_min) t / rounds.
        clip: Clip the global gradient norm of each local step (null: off).
        precision: Of weights and data.
    """

    rounds: PositiveInt = 40
    clients_per_round: PositiveInt = 5
    local_epochs: PositiveInt = 2
    batch_size: PositiveInt = 32
    lr: PositiveFloat = 0.02
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    lr_schedule: Literal["constant", "paper"] = "constant"
    lr_hold: PositiveInt = 80
    lr_min: float = Field(default=1e-4, ge=0)
    clip: PositiveFloat | None = None
    precision: Literal["float32", "float64"] = "float32"


class EvaluateConfig(Section):
    """Validation every `every` rounds and in the last; test once, at the end.

    Attributes:
        every: Rounds between validations.
        probe: Fit a linear probe a modality on the encoders' training features, at the end.
        choose: Which model meets the test data: "last", or the one of the "best" validation accuracy.
    """

    every: PositiveInt = 1
    probe: bool = True
    choose: Literal["last", "best"] = "last"


class PolicyConfig(Section):
    """What the server does with bad, late and missing replies. Strict by default; every decision is recorded.

    Attributes:
        min_replies: Share of the asked clients that must contribute to a round.
        min_owners: Clients that must contribute each trained modality before its block moves.
        retries: How often a failed or refused client is asked again in the same round.
        on_short: Fewer than `min_replies`: "fail" ends the run (resumable), "skip" keeps the old model for
            this round, "accept" aggregates what came.
        deadline_s: Seconds to wait for a round's replies (null: no limit).
        max_update_norm: Refuse an update whose L2 distance to the sent model exceeds this (null: off).
        quarantine_after: Refusals in a row after which a client is left out for `quarantine_rounds` (0: never).
    """

    min_replies: float = Field(default=1.0, gt=0, le=1)
    min_owners: PositiveInt = 1
    retries: int = Field(default=1, ge=0)
    on_short: Literal["fail", "skip", "accept"] = "fail"
    deadline_s: PositiveFloat | None = None
    max_update_norm: PositiveFloat | None = None
    quarantine_after: int = Field(default=0, ge=0)
    quarantine_rounds: PositiveInt = 5


class EngineConfig(Section):
    """Where clients run: inproc (this process), ray (persistent Ray workers), flower (Flower's own runtime).

    Attributes:
        workers: Processes of ray and of Flower's simulation.
        cohort: Clients that train as one stacked computation: "on", "off" (one by one), or "auto": what a short probe
            at the start finds faster (on a CPU, convolutions of more than 32 channels train one by one, without
            timing). Both give the same weights to float tolerance.
        cohort_size: Largest number of clients in a stack, a power of two. On a GPU hundreds of small clients fit.
        device: Where clients of inproc and ray train: "cpu", or "cuda" (all workers share the card).
    """

    name: Literal["inproc", "ray", "flower"] = "inproc"
    workers: PositiveInt = 2
    cohort: Literal["auto", "on", "off"] = "auto"
    cohort_size: PositiveInt = 32
    device: Literal["cpu", "cuda"] = "cpu"

    @field_validator("cohort_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"cohort_size is {value}; use a power of two, such as {1 << value.bit_length() - 1}")
        return value


class CheckpointConfig(Section):
    """A checkpoint every `every` rounds, the newest `keep` kept."""

    every: PositiveInt = 1
    keep: PositiveInt = 2


class FaultConfig(Section):
    """A planned fault, for tests and drills: what the client does wrong, in which rounds, how often a round.

    Attributes:
        kind: nan, shape, dtype, zero_samples, missing_block, duplicate, stale, raise, kill (SIGKILL the worker).
        clients: Partition indices; null = every client.
        rounds: Rounds (from 1); null = every round.
        attempts: Faulty attempts a round; later attempts of that round behave.
    """

    kind: Literal["nan", "shape", "dtype", "zero_samples", "missing_block", "duplicate", "stale", "raise", "kill"]
    clients: list[int] | None = None
    rounds: list[int] | None = None
    attempts: PositiveInt = 1


class Config(Section):
    """One run: data x scenario x model x objective x strategy x selection, and how it is trained and executed."""

    method: str | None = None
    data: DataConfig = DataConfig()
    scenario: ScenarioConfig = ScenarioConfig()
    model: ModelConfig = ModelConfig()
    objective: Plugin = Plugin(name="joint")
    strategy: Plugin = Plugin(name="fedavg")
    selection: Plugin = Plugin(name="uniform")
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    observe: ObserveConfig = ObserveConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()
    devices: DevicesConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: list[FaultConfig] = Field(default_factory=list)
    seed: int = Field(default=0, ge=0)

    @field_validator("data", "objective", "strategy", "selection", "engine", "devices", mode="before")
    @classmethod
    def _shorthand(cls, value: object, info: ValidationInfo) -> object:
        return SHORTHANDS[str(info.field_name)](value)

    @model_validator(mode="after")
    def _enough_clients(self) -> Config:
        if self.train.clients_per_round > self.scenario.clients:
            raise ValueError(
                f"train.clients_per_round is {self.train.clients_per_round}, but scenario.clients is only "
                f"{self.scenario.clients}; lower the first or raise the second"
            )
        return self


class TuneConfig(Section):
    """Tuning before a comparison: the same number of candidates a method, chosen by validation accuracy alone.

    Attributes:
        candidates: Method label -> list of overrides to try; all lists must be equally long.
        seed: Seed of the trials; the comparison's seeds should not contain it.
        on: Setting -> setting whose trials it uses (itself by default), to tune once a data set.
    """

    candidates: dict[str, list[dict[str, Any]]]
    seed: int = 100
    on: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _same_budget(self) -> TuneConfig:
        if len({len(trials) for trials in self.candidates.values()}) > 1:
            sizes = ", ".join(f"{label} {len(trials)}" for label, trials in self.candidates.items())
            raise ValueError(f"every method gets the same number of candidates, but they are: {sizes}")
        return self


class CompareConfig(Section):
    """A comparison: settings x methods x seeds over one base configuration.

    Attributes:
        methods: Label -> overrides on the base (nested mapping); a plain preset name stands for `{method: name}`.
        settings: Label -> overrides on the base, e.g. another data set; one unnamed setting by default.
        seeds: Seeds; every method and setting uses the same ones.
        baseline: Method that paired differences are taken against.
        references: Reference lines to compute besides the methods.
        tune: Tuning that runs first, if any.
        base: The configuration that the overrides change, as read (not yet validated).
        overrides: From the command line; they win over base, settings and methods.
    """

    methods: dict[str, dict[str, Any]]
    settings: dict[str, dict[str, Any]] = Field(default={"default": {}})
    seeds: list[int]
    baseline: str
    references: list[Literal["majority", "local", "centralised", "unimodal"]] = Field(default_factory=list)
    tune: TuneConfig | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
