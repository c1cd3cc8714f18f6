"""From YAML files, method presets and `key=value` overrides to a validated `Config`, and back to YAML.

Later wins: schema defaults < method preset < file < overrides. Values merge key by key, except that another name for
the data set, objective, strategy or selection drops the parameters of the former one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedmm.config import yaml_text
from fedmm.config.layers import Layer, command_line, flatten, nest, parse_override, stack
from fedmm.config.presets import PRESETS, get_preset
from fedmm.config.problems import config_error, shown
from fedmm.config.schema import CompareConfig, Config
from fedmm.errors import ConfigError, nearest

COMPARE_KEYS = frozenset({"methods", "settings", "seeds", "baseline", "references", "tune"})
"""What a comparison's YAML holds besides the keys of a run, which are its base."""

DEFAULT_SEEDS = [0, 1, 2]


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each value came from.

    Attributes:
        config: The validated configuration.
        origin: Config path of each value -> "default", "preset NAME", "file PATH" or "command line".
    """

    config: Config
    origin: dict[str, str]


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Resolved:
    """Read the configuration of one run.

    Args:
        path: YAML file; None = defaults.
        overrides: `key=value`, dotted keys, values as YAML.

    Raises:
        ConfigError: Unreadable file, unknown key or method, illegal value; lists every problem found.
    """
    layers = []
    if path is not None:
        where, nested = f"file {path}", yaml_text.read(Path(path))
        if not COMPARE_KEYS.isdisjoint(nested):
            key = min(COMPARE_KEYS & set(nested))
            raise ConfigError("belongs to a comparison", where=f"{where}: {key}", remedy=f"fedmm compare {path}")
        layers.append(Layer(where, flatten(nested, where)))
    return resolve([*layers, command_line([parse_override(text) for text in overrides])])


def resolve(layers: Sequence[Layer], where: str = "") -> Resolved:
    """Lay the user's layers over the defaults and the preset of the method that they name, and validate.

    Args:
        layers: Lowest first.
        where: What is being resolved, for the head of messages.

    Raises:
        ConfigError: Unknown method, unknown key, illegal value.
    """
    method = next((layer.values["method"] for layer in reversed(layers) if "method" in layer.values), None)
    base = [Layer("default", flatten(Config().model_dump(), "default"))]
    if method is not None:
        preset = get_preset(method, where=f"{where}: method" if where else "method")
        base.append(Layer(f"preset {method}", flatten(preset.overrides, f"preset {method}")))
    values, origin = stack([*base, *layers])
    try:
        config = Config.model_validate(nest(values))
    except ValidationError as error:
        raise config_error(error, Config, {k: o for k, o in origin.items() if o != "default"}, where) from None
    leaves = flatten(config.model_dump(), "configuration")
    return Resolved(config, {path: origin.get(path, "default") for path in leaves})


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: the method called `label` in one setting with one seed."""

    setting: str
    label: str
    seed: int
    config: Config


def load_compare(path: Path | str | None, overrides: Sequence[str] = ()) -> CompareConfig:
    """Read the configuration of a comparison.

    `methods` is a list of presets, or a mapping label -> overrides in which `method` names the preset (a label that
    is a preset's name needs none). `settings` is a mapping label -> overrides. `seeds` is a list, or n for 0..n-1.
    On the command line, `methods=[a, b]` and `settings=[a]` pick among the file's labels; any other key given there
    wins over base, settings and methods, except `method`, which changes the base alone.

    Args:
        path: YAML file; None = only the overrides.
        overrides: `key=value`, as in `load_config`.

    Raises:
        ConfigError: As `load_config`; no methods; unknown labels.
    """
    where = "command line" if path is None else f"file {path}"
    written = {} if path is None else yaml_text.read(Path(path))
    line = [parse_override(text) for text in overrides]
    for key in (*written, *(key for key, _ in line)):
        _check_top_level_key(key)
    given = {key: value for key, value in line if key in COMPARE_KEYS | {"method", "seed"}}
    chosen = {**written, **given}
    if "methods" not in chosen:
        what = f"has one method, {chosen['method']}, and" if "method" in chosen else "has"
        raise ConfigError(f"a comparison that {what} no methods", where=where, remedy='add "methods: [fedavg, fedcmi]"')
    methods: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {"default": {}}
    offered: set[str] = set()
    for source, values in ((where, written), ("command line", given)):
        if "methods" in values:
            methods = _methods(values["methods"], methods, f"{source}: methods", named="method" in chosen)
        if "settings" in values:
            settings = _labelled(values["settings"], settings, f"{source}: settings")
        offered |= methods.keys()
    if "methods" in given and "baseline" not in given and chosen.get("baseline") not in methods:
        chosen.pop("baseline", None)
    baseline = chosen.get("baseline", next(iter(methods)))
    if baseline not in list(methods):
        raise ConfigError(
            f"{shown(baseline)} is none of the methods", where="baseline", remedy=nearest(str(baseline), methods)
        )
    base = {key: value for key, value in written.items() if key not in COMPARE_KEYS | {"seed"}}
    on_top = command_line([(key, value) for key, value in line if key not in given])
    try:
        return CompareConfig(
            methods=methods,
            settings=settings,
            seeds=_seeds(given if {"seed", "seeds"} & given.keys() else written),
            baseline=baseline,
            references=chosen.get("references", []),
            tune=_tune(chosen.get("tune"), offered - methods.keys()),
            base={**base, **({"method": given["method"]} if "method" in given else {})},
            overrides=nest(on_top.values),
        )
    except ValidationError as error:
        raise config_error(error, CompareConfig, {}, where) from None


def expand(compare: CompareConfig) -> list[Cell]:
    """List the runs of a comparison, settings first, then methods, then seeds; each is validated.

    Raises:
        ConfigError: A run's configuration is not valid (names setting and method), or two methods are the same.
    """
    base = Layer("the base", flatten(compare.base, "the base"))
    on_top = Layer("command line", flatten(compare.overrides, "command line"))
    cells = []
    for setting, changes in compare.settings.items():
        in_setting = Layer(f"setting {setting}", flatten(changes, f"setting {setting}"))
        labels: dict[str, str] = {}
        for label, overrides in compare.methods.items():
            where = f"setting {setting}, method {label}"
            layers = [base, in_setting, Layer(f"method {label}", flatten(overrides, where)), on_top]
            runs = [resolve([*layers, Layer("seeds", {"seed": seed})], where).config for seed in compare.seeds]
            twin = labels.setdefault(config_hash(runs[0].model_copy(update={"method": None})), label)
            if twin != label:
                raise ConfigError(
                    f'is the same configuration as method "{twin}"',
                    where=where,
                    remedy="what differs belongs under methods; the base and the command line apply to all of them",
                )
            cells += [Cell(setting, label, seed, run) for seed, run in zip(compare.seeds, runs, strict=True)]
    return cells


def _tune(value: Any, dropped: set[str]) -> Any:
    """`tune` without the candidates of methods that were not picked."""
    if not isinstance(value, dict) or not isinstance(value.get("candidates"), dict):
        return value
    kept = {label: trials for label, trials in value["candidates"].items() if label not in dropped}
    return {**value, "candidates": kept}


def _check_top_level_key(key: str) -> None:
    top, _, below = key.partition(".")
    known = COMPARE_KEYS | set(Config.model_fields)
    if top not in known:
        raise ConfigError("unknown key", where=key, remedy=nearest(top, known))
    if top in COMPARE_KEYS and below:
        raise ConfigError("cannot be changed in part", where=key, remedy=f"give {top} whole, or edit the file")


def _methods(value: Any, known: Mapping[str, Any], where: str, *, named: bool) -> dict[str, dict[str, Any]]:
    """Read `methods`; `named` says that the base names a method for the labels that name none."""
    if isinstance(value, list):
        presets = [label for label in value if isinstance(label, str) and label not in known]
        for label in presets:
            get_preset(label, where)
        return _labelled(value, {**known, **{label: {"method": label} for label in presets}}, where)
    if isinstance(value, dict):
        value = {key: {"method": inner} if isinstance(inner, str) else inner for key, inner in value.items()}
    table = _labelled(value, known, where)
    for label, overrides in table.items():
        if "method" not in overrides and (label in PRESETS or not (overrides or named)):
            get_preset(label, where)
            table[label] = {"method": label, **overrides}
    return table


def _labelled(value: Any, known: Mapping[str, dict[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """Read a mapping label -> overrides, or a list of known labels."""
    if isinstance(value, list):
        for label in value:
            if label not in list(known):  # what YAML holds may be unhashable
                raise ConfigError(f"{shown(label)} is not known", where=where, remedy=nearest(str(label), known))
        if len(set(value)) < len(value):
            raise ConfigError("a label stands twice", where=where, remedy="keep one of them")
    if not isinstance(value, dict | list) or not value:
        raise ConfigError(f"{shown(value)} was given", where=where, remedy="give a list or a mapping with an entry")
    value = {label: known[label] for label in value} if isinstance(value, list) else value
    for label, overrides in value.items():
        if not label or label.startswith(".") or set(label) & set("/\\"):
            raise ConfigError(f'"{label}" cannot be a label', where=where, remedy="it names a directory; use letters")
        if not isinstance(overrides, dict | None):
            raise ConfigError(f"{shown(overrides)} was given", where=f"{where}: {label}", remedy="give a mapping")
        for key in overrides or {}:
            if key in COMPARE_KEYS | {"seed"} or (key == "method" and where.endswith("settings")):
                raise ConfigError("cannot be set here", where=f"{where}: {label}: {key}", remedy="set it at the top")
    return {label: overrides or {} for label, overrides in value.items()}


def _seeds(values: Mapping[str, Any]) -> list[int]:
    """`seeds` as a list: as written, 0..n-1 for n, the one `seed`, or the default."""
    seeds = values.get("seeds", [values["seed"]] if "seed" in values else DEFAULT_SEEDS)
    listed = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    proper = isinstance(listed, list) and all(type(seed) is int and seed >= 0 for seed in listed)
    if not proper or not listed or len(set(listed)) < len(listed):
        raise ConfigError(f"{seeds} was given", where="seeds", remedy="give different whole numbers >= 0, or how many")
    return listed


def dump_config(config: Config) -> str:
    """The configuration as YAML, every value written out; `load_config` reads an equal one back."""
    return yaml_text.write(config.model_dump())


def config_hash(config: Config) -> str:
    """SHA-256 (hex) of a configuration: equal for equal configurations, whatever the order of their keys."""
    text = json.dumps(_canonical(config.model_dump()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Write 1.0 as 1, since the two are equal in a plug-in's parameters."""
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
