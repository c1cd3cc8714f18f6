"""From a configuration to the parts of a run, refusing what does not fit together before any data are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fedmm.config.schema import Config
from fedmm.data import load_dataset
from fedmm.errors import ConfigError
from fedmm.models import MultimodalModel, build_model
from fedmm.objectives import Objective, build_objective
from fedmm.spec import client_spec
from fedmm.types import Dataset
from server.knowledge import KNOWLEDGE
from server.selection import Selector, build_selector
from server.strategies import Strategy, build_strategy

_MODEL_PARTS = {
    "projector": ("model.projector", "{depth: 3}"),
    "unimodal_heads": ("model.unimodal_heads", "true"),
    "boosting": ("model.boosting", "{slots: 4}"),
}


@dataclass(frozen=True)
class Plan:
    """The parts that a configuration names, built and checked."""

    config: Config
    spec: str
    dataset: Dataset
    model: MultimodalModel
    objective: Objective
    strategy: Strategy
    selector: Selector


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


def plan(config: Config) -> Plan:
    """Load the data and build everything.

    Raises:
        ConfigError: See `check`.
        DataError: The data are missing or damaged.
    """
    objective, strategy, selector = check(config)
    dataset = load_dataset(config.data)
    check_modalities(config, objective, selector, dataset.modalities)
    model = build_model(dataset.specs, len(dataset.classes), config.model, config.seed)
    return Plan(config, client_spec(config), dataset, model, objective, strategy, selector)
