"""Equal tuning for every method of a comparison: trials on one seed, chosen on validation, all on record.

<out>/tuning/<setting>/<label>/trial-<i>/   one run each
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmm.config.load import Cell, expand
from fedmm.config.schema import CompareConfig, TuneConfig
from fedmm.errors import ConfigError, nearest


@dataclass(frozen=True)
class Trial:
    """One candidate of one method in one setting."""

    cell: Cell
    number: int
    overrides: dict[str, Any]

    def place(self, out: Path) -> Path:
        """The trial's run directory."""
        return out / "tuning" / self.cell.setting / self.cell.label / f"trial-{self.number}"


def trials(comparison: CompareConfig) -> list[Trial]:
    """All trials that a comparison's `tune` section asks for, in the settings that others are tuned on.

    Raises:
        ConfigError: `tune` names an unknown method or setting, or a candidate is not valid.
    """
    tune = comparison.tune
    if tune is None:
        return []
    for label in tune.candidates:
        if label not in comparison.methods:
            raise ConfigError(
                "is none of the methods", where=f"tune.candidates.{label}", remedy=nearest(label, comparison.methods)
            )
    found = []
    for setting in dict.fromkeys(source(tune, s) for s in comparison.settings):
        if setting not in comparison.settings:
            raise ConfigError(
                "is none of the settings", where=f"tune.on: {setting}", remedy=nearest(setting, comparison.settings)
            )
        for label, candidates in tune.candidates.items():
            for number, overrides in enumerate(candidates):
                cells = expand(
                    _only(comparison, setting, {label: merged(comparison.methods[label], overrides)}, [tune.seed])
                )
                found.append(Trial(cells[0], number, overrides))
    return found


def tuned_cells(comparison: CompareConfig, out: Path) -> list[Cell]:
    """Runs of the comparison with the chosen candidates, once the trials are done (or with none to choose from)."""
    chosen = choices(comparison, out)
    cells = []
    for setting in comparison.settings:
        best = chosen.get(source(comparison.tune, setting), {}) if comparison.tune else {}
        methods = {
            label: merged(overrides, best[label]["overrides"]) if label in best else overrides
            for label, overrides in comparison.methods.items()
        }
        cells += expand(_only(comparison, setting, methods, comparison.seeds))
    return cells


def choices(comparison: CompareConfig, out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Setting -> method -> {overrides, validation, trials}: every trial's validation accuracy and the chosen one.

    A failed trial counts as -1. The first of equal trials is chosen.
    """
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for trial in trials(comparison):
        entry = record.setdefault(trial.cell.setting, {}).setdefault(
            trial.cell.label, {"validation": -2.0, "trials": []}
        )
        score = _validation(trial.place(out))
        entry["trials"].append({"overrides": trial.overrides, "validation": score})
        if score is not None and score > entry["validation"]:
            entry |= {"overrides": trial.overrides, "validation": score}
    return {
        setting: {label: entry for label, entry in methods.items() if "overrides" in entry}
        for setting, methods in record.items()
    }


def source(tune: TuneConfig, setting: str) -> str:
    """The setting whose trials decide for `setting`."""
    return tune.on.get(setting, setting)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second winning key by key."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _only(
    comparison: CompareConfig, setting: str, methods: dict[str, dict[str, Any]], seeds: list[int]
) -> CompareConfig:
    return comparison.model_copy(
        update={"settings": {setting: comparison.settings[setting]}, "methods": methods, "seeds": seeds}
    )


def _validation(place: Path) -> float | None:
    """Validation accuracy of a finished trial, -1 of a failed one, None of one that has not run."""
    try:
        summary = json.loads((place / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return float(summary["val"]["accuracy"]) if "val" in summary else -1.0
