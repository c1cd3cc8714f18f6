"""Build a plug-in (objective, strategy, selector) from its name and parameters, with errors that help."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedmm.config.problems import describe
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
        ConfigError: Unknown name, unknown parameter, or a value of the wrong type or out of range.
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
        first = error.errors(include_url=False)[0]
        place = ".".join([role, *map(str, first["loc"])])
        place, what, cure = describe(place, [("", dict(first))], Plugin, {})
        raise ConfigError(what, where=place, remedy=cure) from None
    return built


def imported(name: str, where: str) -> Any:
    """What a path `package.module:name` of the user's own code leads to.

    Args:
        name: The path.
        where: Config path, for the message.

    Raises:
        ConfigError: It leads nowhere, or the module fails while it is imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a stranger's module may do anything; its traceback is kept for Python callers
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f'cannot import "{name}": {reason}',
            where=where,
            remedy="write package.module:name, and make sure that Python finds the module and can import it",
        ) from error


def _imported(role: str, name: str, table: Mapping[str, type[T]], base: type[T]) -> type[T]:
    if ":" not in name:
        raise ConfigError(f'unknown {role} "{name}"', where=f"{role}.name", remedy=nearest(name, table))
    cls = imported(name, f"{role}.name")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(
            f'"{name}" is not a subclass of {base.__module__}.{base.__name__}',
            where=f"{role}.name",
            remedy="name a class that derives from it",
        )
    return cls
