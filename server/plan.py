"""From a configuration to the parts of a run, refusing what does not fit together before any data are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fedmm.config.schema import Config
from fedmm.data import load_dataset
from fedmm.data.missing import owners
from fedmm.engines.costs import training_memory
from fedmm.engines.devices import Fleet, Precision, build_fleet, refuse_too_small
from fedmm.errors import ConfigError
from fedmm.models import MultimodalModel, build_model
from fedmm.objectives import Objective, build_objective
from fedmm.seeding import numpy_rng
from fedmm.spec import client_spec
from fedmm.types import Dataset
from server.knowledge import KNOWLEDGE
from server.selection import Selector, build_selector
from server.selection.uniform import Uniform
from server.strategies import FedAvg, Strategy, build_strategy

_MODEL_PARTS = {
    "projector": ("model.projector", "{depth: 3}"),
    "unimodal_heads": ("model.unimodal_heads", "true"),
    "boosting": ("model.boosting", "{slots: 4}"),
}


@dataclass(frozen=True)
class Plan:
    """The parts that a configuration names, built and checked; without `devices` the fleet is empty."""

    config: Config
    spec: str
    dataset: Dataset
    model: MultimodalModel
    objective: Objective
    strategy: Strategy
    selector: Selector
    fleet: Fleet = ()


def check(config: Config) -> tuple[Objective, Strategy, Selector]:
    """Build the plug-ins and refuse illegal combinations; no data are touched.

    Raises:
        ConfigError: An unknown plug-in or parameter, or a combination that means nothing, with the reason.
    """
    objective = build_objective(config.objective)
    strategy = build_strategy(config.strategy)
    selector = build_selector(config.selection)
    for part in sorted(objective.requires):
        path, value = _MODEL_PARTS[part]
        if not getattr(config.model, part):
            raise ConfigError(
                f'objective "{config.objective.name}" needs it',
                where=path,
                remedy=f"set {path}={value}, or use the preset",
            )
    if config.model.fusion == "late" and (config.model.projector is not None or not config.model.unimodal_heads):
        raise ConfigError(
            "late fusion is the mean of the unimodal heads, without projectors",
            where="model.fusion",
            remedy="set model.unimodal_heads=true and model.projector=null, or use fusion: concat",
        )
    if objective.requires >= {"projector"} and config.model.projector is not None and not config.model.unimodal_heads:
        raise ConfigError(
            "the projectors share the unimodal heads", where="model.unimodal_heads", remedy="set it to true"
        )
    for kind in objective.knowledge() | selector.knowledge() | strategy.needs:
        if kind not in KNOWLEDGE:
            raise ConfigError(f'unknown knowledge "{kind}"', where="objective", remedy=", ".join(sorted(KNOWLEDGE)))
    if "confidence" in objective.knowledge() and not config.model.unimodal_heads:
        raise ConfigError("confidence needs own heads", where="model.unimodal_heads", remedy="set it to true")
    if config.model.norm == "batch" and config.scenario.modalities.missing > 0:
        raise ConfigError(
            "batch statistics would mix absent samples into present ones",
            where="model.norm",
            remedy="use norm: group with scenario.modalities.missing > 0",
        )
    check_devices(config, objective, selector, strategy)
    if config.data.modalities is not None:
        check_modalities(config, objective, selector, tuple(config.data.modalities))
    return objective, strategy, selector


def check_modalities(config: Config, objective: Objective, selector: Selector, modalities: tuple[str, ...]) -> None:
    """Refuse methods that need more modalities than there are.

    Raises:
        ConfigError: With the method and the number it needs.
    """
    for where, part in (("objective", objective), ("selection", selector)):
        if len(modalities) < part.least_modalities:
            name = getattr(config, where).name
            raise ConfigError(
                f'"{name}" needs at least {part.least_modalities} modalities, but the data have {len(modalities)} '
                f"({', '.join(modalities)})",
                where=where,
                remedy="use objective joint and selection uniform for a single modality",
            )


def check_devices(config: Config, objective: Objective, selector: Selector, strategy: Strategy) -> None:
    """Refuse devices that cannot be dealt out, and methods that need rounds where there are none.

    Raises:
        ConfigError: With the reason.
    """
    if config.devices is None:
        return
    build_fleet(config.devices, config.scenario.clients, config.seed)
    if config.devices.mode != "buffered":
        return
    where, remedy = "devices.mode", "use mode: synchronous, or the fedavg method's {0}"
    if not isinstance(selector, Uniform):
        raise ConfigError(
            f'"{config.selection.name}" chooses clients for a round, but buffered mode has no rounds: whoever is '
            "ready trains",
            where=where,
            remedy=remedy.format("selection: uniform"),
        )
    if not isinstance(strategy, FedAvg):
        raise ConfigError(
            f'buffered mode adds up changes itself, and "{config.strategy.name}" would have no part in it',
            where=where,
            remedy=remedy.format("strategy: fedavg"),
        )
    for kind in sorted(objective.knowledge()):
        if KNOWLEDGE[kind].bootstrap or KNOWLEDGE[kind].deltas is not None:
            raise ConfigError(
                f'"{config.objective.name}" needs {kind} of all clients before the first round, but buffered mode has '
                "no moment at which all are there",
                where=where,
                remedy=remedy.format("objective: joint"),
            )
    if config.devices.buffer.concurrency > config.scenario.clients:
        raise ConfigError(
            f"{config.devices.buffer.concurrency} clients are to train at a time, but there are only "
            f"{config.scenario.clients}",
            where="devices.buffer.concurrency",
            remedy=f"set it to at most {config.scenario.clients}",
        )
    if config.policy.quarantine_after:
        raise ConfigError(
            "quarantine counts rounds, but buffered mode has none",
            where="policy.quarantine_after",
            remedy="set it to 0, or use devices.mode: synchronous",
        )


def plan_fleet(config: Config, dataset: Dataset, model: MultimodalModel) -> Fleet:
    """The device of each client; empty without `devices`.

    Raises:
        ConfigError: Devices cannot be dealt out, or cannot hold the training of their clients.
    """
    if config.devices is None:
        return ()
    setting, clients = config.scenario.modalities, config.scenario.clients
    fleet = build_fleet(config.devices, clients, config.seed)
    owned = owners(clients, dataset.modalities, setting.multimodal, numpy_rng(config.seed, "owners"))

    @cache
    def need(modalities: tuple[str, ...], batch_size: int, precision: Precision) -> int:
        momentum = config.train.momentum > 0
        return training_memory(model, dataset.specs, modalities, batch_size, precision, momentum=momentum).total

    refuse_too_small(
        fleet,
        {
            k: need(owned[k], device.batch_size or config.train.batch_size, device.precision)
            for k, device in enumerate(fleet)
        },
    )
    return fleet


def plan(config: Config) -> Plan:
    """Load the data and build everything.

    Raises:
        ConfigError: See `check`; or a device is too small for the model.
        DataError: The data are missing or damaged.
    """
    objective, strategy, selector = check(config)
    dataset = load_dataset(config.data)
    check_modalities(config, objective, selector, dataset.modalities)
    model = build_model(dataset.specs, len(dataset.classes), config.model, config.seed)
    fleet = plan_fleet(config, dataset, model)
    return Plan(config, client_spec(config), dataset, model, objective, strategy, selector, fleet)
