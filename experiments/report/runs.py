"""Every run as one row, failed ones too: what the table of means was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.report.read import Run, Study

_PLAIN = (
    "rounds",
    "chosen_round",
    "parameters",
    "bytes_up",
    "bytes_down",
    "seconds",
    "replies_expected",
    "replies_used",
    "weights_sha256",
)


def runs_table(study: Study) -> pd.DataFrame:
    """One row a run: setting, method, seed, status, then validation and test figures with the metric in the name."""
    return pd.DataFrame([_row(run) for run in study.runs])


def _row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": run.setting, "method": run.label, "seed": run.seed, "status": run.status}
    for split in ("val", "test"):
        figures = run.summary.get(split) or {}
        row |= {f"{split}_{name}": figures.get(name) for name in ("accuracy", "macro_f1", "loss")}
        for modality, kinds in (figures.get("per_modality") or {}).items():
            row |= {f"{split}_{modality}_{kind}": value for kind, value in kinds.items()}
    return row | {name: run.summary.get(name) for name in _PLAIN}


def tuning_table(comparison: Path) -> pd.DataFrame:
    """Every trial of a comparison's tuning: setting, method, overrides, validation accuracy, and whether it was chosen.

    Empty if the comparison was not tuned.
    """
    record = json.loads((comparison / "compare.json").read_text()).get("tuning", {})
    return pd.DataFrame(
        [
            {
                "setting": setting,
                "method": method,
                "overrides": json.dumps(trial["overrides"]),
                "validation_accuracy": trial["validation"],
                "chosen": trial["overrides"] == entry["overrides"],
            }
            for setting, methods in record.items()
            for method, entry in methods.items()
            for trial in entry["trials"]
        ]
    )
