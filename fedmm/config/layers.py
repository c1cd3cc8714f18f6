"""Layers of configuration as flat tables `config path -> value`, and the rules by which one lies over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedmm.config import yaml_text
from fedmm.config.schema import SHORTHANDS
from fedmm.errors import ConfigError

Flat: TypeAlias = dict[str, Any]
"""Dotted config path -> scalar, list or empty mapping."""

RENEWED_BY_NAME = ("data", "objective", "strategy", "selection")
"""Sections whose other keys belong to the name: another name starts them anew."""


@dataclass(frozen=True)
class Layer:
    """Values with their origin: "default", "preset fedcmi", "file x.yaml" or "command line"."""

    origin: str
    values: Flat


def flatten(nested: Mapping[str, Any], where: str) -> Flat:
    """Flatten a nested mapping; shorthands become the mappings that they stand for.

    Args:
        nested: As read from YAML. Keys may be dotted: `train.lr: 0.1` is `train: {lr: 0.1}`.
        where: For the message.

    Raises:
        ConfigError: A key is given twice, once dotted and once nested, or has an empty part.
    """
    flat: Flat = {}
    _collect(nested, "", flat, where)
    return flat


def _collect(value: Any, path: str, flat: Flat, where: str) -> None:
    value = SHORTHANDS.get(path, _same)(value)
    if isinstance(value, Mapping) and (value or not path):
        for key, inner in value.items():
            _collect(inner, f"{path}.{key}" if path else str(key), flat, where)
        return
    if not all(path.split(".")):
        raise ConfigError(f'"{path}" is not a key', where=where, remedy="write keys such as train.lr")
    if path in flat:
        raise ConfigError("is given twice", where=f"{where}: {path}", remedy="keep one of them")
    flat[path] = value


def _same(value: object) -> object:
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` and read the value as YAML.

    Raises:
        ConfigError: No "=", an empty key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f'"{text}" is not an override', where="command line", remedy="write key=value")
    if not all(key.split(".")):
        raise ConfigError(f'"{text}" has no proper key', where="command line", remedy="write, e.g., train.lr=0.1")
    return key, yaml_text.parse(value, f"command line: {key}")


def command_line(overrides: Sequence[tuple[str, Any]]) -> Layer:
    """The layer of parsed overrides; of two for one key the later wins."""
    flat: Flat = {}
    for key, value in overrides:
        for path, leaf in flatten({key: value}, "command line").items():
            put(flat, path, leaf)
    return Layer("command line", flat)


def put(flat: Flat, path: str, value: Any) -> None:
    """Set one path; it replaces what lies above and below it, save that `{}` leaves what lies below."""
    below = [key for key in flat if key.startswith(f"{path}.")]
    if value == {} and below:
        return
    for key in (*below, *(key for key in flat if path.startswith(f"{key}."))):
        del flat[key]
    flat[path] = value


def stack(layers: Sequence[Layer]) -> tuple[Flat, dict[str, str]]:
    """Lay layers over each other, the last on top, and return the values and the origin of each."""
    values: Flat = {}
    origin: dict[str, str] = {}
    for layer in layers:
        for section in RENEWED_BY_NAME:
            name = layer.values.get(f"{section}.name")
            if name is not None and name != values.get(f"{section}.name"):
                values = {key: value for key, value in values.items() if not key.startswith(f"{section}.")}
        for path, value in layer.values.items():
            put(values, path, value)
            origin[path] = layer.origin
    return values, {path: origin[path] for path in values}


def nest(flat: Flat) -> dict[str, Any]:
    """The nested mapping that a flat one stands for."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        inner = nested
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested
