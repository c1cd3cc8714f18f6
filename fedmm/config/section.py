"""The base of every section of a configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

_LARGEST_REAL = 3.4e38
"""What float32, in which models train, still holds."""

_LARGEST_WHOLE = 2**63 - 1


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, numbers finite, text never converted to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _held(cls, value: Any) -> Any:
        """Refuse numbers that no arithmetic behind this would hold."""
        _check(value)
        return value


def _check(value: Any) -> None:
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check(inner)
    elif isinstance(value, int | float):
        largest = _LARGEST_REAL if isinstance(value, float) else _LARGEST_WHOLE
        if largest < abs(value) < float("inf"):
            raise ValueError(f"{value:.3g} was given, allowed: at most {largest:.3g}")
