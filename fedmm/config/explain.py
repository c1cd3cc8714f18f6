"""Where each value of a configuration came from, as rows for a table."""

from __future__ import annotations

from dataclasses import dataclass

from fedmm.config.layers import flatten
from fedmm.config.load import Resolved
from fedmm.config.yaml_text import write


@dataclass(frozen=True)
class Row:
    """One value: its config path, the value as YAML, and where it was set."""

    key: str
    value: str
    origin: str


def explain(resolved: Resolved) -> list[Row]:
    """List every value of a configuration in the order of the schema."""
    values = flatten(resolved.config.model_dump(), "configuration")
    return [Row(key, _inline(value), resolved.origin[key]) for key, value in values.items()]


def _inline(value: object) -> str:
    return write(value, flow=True).removesuffix("\n...\n").strip()
