"""Pydantic's complaints in the user's words: config path, what was given and where, what is allowed, what to do."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fedmm.config.yaml_text import kind
from fedmm.errors import ConfigError, nearest

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "too_short": "a list with an entry",
}


def config_error(error: ValidationError, model: type[BaseModel], origin: Mapping[str, str], where: str) -> ConfigError:
    """Turn pydantic's errors into one `ConfigError` that lists each problem.

    Args:
        error: What pydantic found.
        model: The model that was validated.
        origin: Config path -> where the value was set.
        where: File, or setting and method, for the head of the message.
    """
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for detail in error.errors(include_url=False):
        path, section = _locate(detail["loc"], model)
        found.setdefault(path, []).append((section, dict(detail)))
    # Of a union, pydantic reports every branch; the deepest complaint is about what the user meant.
    deepest = {path: at for path, at in found.items() if not any(other.startswith(f"{path}.") for other in found)}
    problems = [describe(path, details, model, origin) for path, details in deepest.items()]
    if len(problems) == 1:
        path, what, remedy = problems[0]
        return ConfigError(what, where=": ".join(filter(None, (where, path))), remedy=remedy)
    lines = [f"{path}: {what}" + (f" ({remedy})" if remedy else "") for path, what, remedy in problems]
    return ConfigError(f"{len(problems)} problems\n  - " + "\n  - ".join(lines), where=where or None)


def fields_of(model: type[BaseModel], path: str) -> list[str]:
    """Names of the fields of the section at a dotted path of `model` ("" = the model itself)."""
    key = False
    for part in filter(None, path.split(".")):
        # After a mapping comes a key of the user's own choice.
        inner, key = (None, False) if key else _section(model, part)
        model = inner or model
    return list(model.model_fields)


def _locate(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, str]:
    """Dotted path of an error, and of the section that holds it; pydantic's union branches are left out."""
    parts: list[str] = []
    current: type[BaseModel] | None = model
    key = False
    for part in location:
        if current is None and not isinstance(part, int) and ("[" in part or part in {"str", "int", "float", "bool"}):
            continue
        parts.append(str(part))
        if key:
            key = False
        elif not isinstance(part, int):
            current, key = _section(current, part) if current else (None, False)
    return ".".join(parts), ".".join(parts[:-1])


def _section(model: type[BaseModel], field: str) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if any, and whether the field is a mapping from names to such sections."""
    info = model.model_fields.get(field)
    found = next(_models(info.annotation), None) if info else None
    return found, found is not None and info is not None and typing.get_origin(info.annotation) is dict


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict):
        for inner in typing.get_args(annotation):
            yield from _models(inner)


def describe(
    path: str, details: list[tuple[str, dict[str, Any]]], model: type[BaseModel], origin: Mapping[str, str]
) -> tuple[str, str, str | None]:
    """What pydantic found at one place: the place, what is wrong, and what to do.

    Args:
        path: The place.
        details: The section and the error, for each branch of a union.
        model: The model that was validated.
        origin: Config path -> where the value was set.
    """
    section, detail = details[0]
    if detail["type"] == "extra_forbidden":
        name = path.rpartition(".")[2]
        return path, f"unknown key{_source(path, origin)}", nearest(name, fields_of(model, section))
    if detail["type"] == "value_error":
        return path, str(detail["ctx"]["error"]), None
    if detail["type"] == "missing":
        return path, "is missing", "add it"
    given = f"{shown(detail['input'])} was given{_source(path, origin)}"
    if detail["type"] == "literal_error":
        options = [option.strip("'") for option in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        listed = f"allowed: {', '.join(options)}"
        close = nearest(str(detail["input"]), options)
        return path, f"{given}, {listed}", close if close.startswith("did") else "choose one of them"
    allowed = " or ".join(dict.fromkeys(_allowed(each, path, model) for _, each in details))
    return path, f"{given}, allowed: {allowed}", "correct the value"


def _allowed(detail: dict[str, Any], path: str, model: type[BaseModel]) -> str:
    if detail["type"] == "model_type":
        return f"a mapping with {', '.join(fields_of(model, path))}"
    message = str(detail["msg"]).removeprefix("Input should be ").removeprefix("Input should ")
    return _EXPECTED.get(detail["type"], message)


def _source(path: str, origin: Mapping[str, str]) -> str:
    near = (key for key in origin if f"{key}.".startswith(f"{path}.") or path.startswith(f"{key}."))
    source = next((origin[key] for key in near), None)
    return f" on the {source}" if source == "command line" else f" in {source}" if source else ""


def shown(value: Any) -> str:
    """A value as a message shows it: text in quotes, long values by their kind."""
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if isinstance(value, bool | int | float | str) and len(text) <= 60 else kind(value)
