"""YAML in and out, in the 1.2 reading: `1e-3` is a number, `off` and `no` are text, a key stands once.

PyYAML reads YAML 1.1, in which `1e-3` is text, `off` is false and `12:30` is 750; each of these has spoilt
somebody's experiment without a word.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fedmm.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


def _refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 that refuses repeated keys and keys that are not text."""

    # PyYAML's class attributes: its own scalars and its tags for sets, dates and bytes are left out.
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in {"null", "bool", "int", "float", "str", "seq", "map"}
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not key.tag.endswith((":str", ":merge")):
                raise _refusal("this key is not text; put it in quotes", key)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key.value}" stands twice', key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """A safe dumper that puts text in quotes wherever YAML 1.1 or 1.2 would read something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, where: str) -> Any:
    """Read one YAML document into plain Python values.

    Args:
        text: The document.
        where: File or key, for the message.

    Raises:
        ConfigError: Not YAML, a repeated key, a key that is not text, or a reference to itself.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark is not None and "\n" in text else ""
        remedy = "text with special characters needs quotes, and indentation is by spaces"
        raise ConfigError(f"{error.problem or error.context}", where=f"{where}{place}", remedy=remedy) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot be read as YAML: {error}", where=where, remedy="correct the text") from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where, remedy="use fewer levels") from None
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: Missing or unreadable file, not UTF-8, not YAML, not a mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy="check the path, or write key=value") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", where=str(path), remedy="name a readable YAML file") from None
    value = parse(text, f"file {path}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"holds {kind(value)}, not a mapping", where=f"file {path}", remedy='write lines such as "method: fedavg"'
        )
    return value


def write(value: Any, *, flow: bool = False) -> str:
    """Write plain values as YAML that `parse`, and any YAML 1.1 reader, takes back unchanged.

    Args:
        value: Mappings, lists and scalars.
        flow: On one line, with brackets and braces.
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=flow)


def kind(value: Any) -> str:
    """Name what a value is, in words a user of YAML knows."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    return names.get(type(value), "a number")
