"""Build a plug-in (objective, strategy, selector) from its name and parameters, with errors that help."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedmm.config.schema import Plugin
from fedmm.errors import ConfigError, nearest

T = TypeVar("T")


def build(role: str, plugin: Plugin, table: Mapping[str, type[T]], base: type[T]) -> T:
    """Instantiate `plugin.name` from `table`, or from a dotted path `package.module:Name`, with its parameters.

    Args:
        role: Config section, named in errors.
        plugin: Name and parameters.
        table: The explicit table of this kind of plug-in.
        base: What a plug-in must be; a frozen dataclass whose fields are its parameters.

    Raises:
        ConfigError: Unknown name, unknown parameter, or a value of the wrong type.
    """
    cls = table.get(plugin.name) or _imported(role, plugin.name, table, base)
    parameters = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set()
    for key in plugin.params:
        if key not in parameters:
            remedy = nearest(key, parameters) if parameters else f"{plugin.name} takes no parameters"
            raise ConfigError(f'{role} "{plugin.name}" has no parameter "{key}"', where=f"{role}.{key}", remedy=remedy)
    try:
        built: T = TypeAdapter(cls).validate_python(plugin.params)
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        where = ".".join([role, *map(str, first["loc"])])
        raise ConfigError(f"{first['msg']}, but got {first['input']!r}", where=where) from None
    return built


def _imported(role: str, name: str, table: Mapping[str, type[T]], base: type[T]) -> type[T]:
    if ":" not in name:
        raise ConfigError(f'unknown {role} "{name}"', where=f"{role}.name", remedy=nearest(name, table))
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f'cannot import "{name}": {error}', where=f"{role}.name", remedy="is it on PYTHONPATH?"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f'"{name}" is not a subclass of {base.__module__}.{base.__name__}', where=f"{role}.name")
    return cls
