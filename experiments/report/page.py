"""Writing the report: the table in three formats and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from experiments.report import curves, maps
from experiments.report.findings import findings, overview, what_ran
from experiments.report.read import Run, Study, data_name, number, read_study
from experiments.report.runs import runs_table, tuning_table
from experiments.report.svg import MODALITIES, Picture
from experiments.report.table import columns, comparison_table, notes, percent, points, to_latex, to_markdown
from fedmm.errors import RunError

EVENTS = 200
"""Most events that the page lists; every event is in its run's manifest."""


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote, and the study and table it wrote it from."""

    html: Path
    markdown: Path
    csv: Path
    latex: Path
    study: Study
    table: pd.DataFrame


def write_report(directories: Sequence[Path], out: Path) -> ReportFiles:
    """Write `report.html`, `table.{md,csv,tex}`, `runs.csv` and, after tuning, `tuning.csv` into `out`.

    Args:
        directories: Directories that `fedmm run` or `fedmm compare` wrote.
        out: Where to write; made if it does not exist.

    Raises:
        ConfigError: A directory is neither a run nor a comparison.
        DataError: A comparison's plan cannot be read.
        RunError: `out` cannot be written.
    """
    study = read_study(directories)
    table = comparison_table(study)
    texts = {
        "report.html": render(study, table),
        "table.md": to_markdown(study, table),
        "table.csv": table.to_csv(index=False),
        "table.tex": to_latex(study, table),
        "runs.csv": runs_table(study).to_csv(index=False),
    }
    tuned = [d for d in directories if (d / "compare.json").exists() and len(tuning_table(d))]
    if tuned:
        texts["tuning.csv"] = pd.concat([tuning_table(d) for d in tuned]).to_csv(index=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the report cannot be written: {error.strerror}", where=str(out), remedy="choose another directory"
        ) from error
    html, markdown, csv, latex = (out / name for name in list(texts)[:4])
    return ReportFiles(html, markdown, csv, latex, study, table)


def render(study: Study, table: pd.DataFrame) -> str:
    """The HTML page as one string that loads nothing from elsewhere and needs no script."""
    environment = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    slot = curves.slots(study)
    several = len(study.settings) > 1
    blocks = [_block(study, table, setting, f"s{at}") for at, setting in enumerate(study.settings)]
    return environment.get_template("report.html.j2").render(
        study=study,
        sentence=what_ran(study),
        provenance_line=_provenance_line(study),
        findings=overview(study, table),
        legend=[(method, f"--m{slot[method]}") for method in study.methods],
        matrix=_matrix(study, table) if several else [],
        forest=maps.differences(study, table, "forest"),
        blocks=blocks,
        several=several,
        notes=notes(study, table),
        runs=[_run(run) for run in study.runs],
        troubles=_troubles(study),
        events=_events(study)[:EVENTS],
        events_total=len(_events(study)),
        provenance=_provenance(study),
        commands=_commands(study),
    )


def _block(study: Study, table: pd.DataFrame, setting: str, prefix: str) -> dict[str, Any]:
    rows = table[table["setting"] == setting] if len(table) else table
    shown = columns(rows, setting=False) if len(rows) else []
    modalities = study.modalities(setting)
    pictures: dict[str, list[Picture]] = {
        "main": _present(
            curves.accuracy_curves(study, setting, f"{prefix}-acc"),
            curves.traffic_curves(study, setting, f"{prefix}-mb"),
            curves.time_curves(study, setting, f"{prefix}-time"),
        ),
        "modalities": curves.modality_curves(study, setting, f"{prefix}-mod"),
        "imbalance": curves.imbalance_curves(study, setting, f"{prefix}-imb"),
        "observatory": curves.observatory_curves(study, setting, f"{prefix}-obs"),
        "heat": maps.heat(study, setting, f"{prefix}-heat"),
        "selection": maps.selection(study, setting, f"{prefix}-sel"),
        "partition": _present(maps.partition(study, setting, f"{prefix}-part")),
    }
    return {
        "setting": setting,
        "id": prefix,
        "findings": findings(study, table, setting),
        "columns": shown,
        "rows": [
            {
                "cells": [column.text(row) for column in shown],
                "kind": row["kind"],
                "best": row["best"],
                "verdict": row["verdict"],
            }
            for row in rows.to_dict("records")
        ],
        "pictures": pictures,
        "modalities": [(name, f"--q{at % MODALITIES}") for at, name in enumerate(modalities)],
    }


def _present(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _matrix(study: Study, table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row a setting, one cell a method: accuracy, difference to the baseline, verdict."""
    rows = {(r["setting"], r["method"]): r for r in table.to_dict("records") if r["kind"] == "method"}
    return [
        {
            "setting": setting,
            "cells": [
                {
                    "accuracy": percent(row["accuracy"]),
                    "diff": "" if pd.isna(row["diff"]) else points(row["diff"]),
                    "verdict": row["verdict"],
                    "best": row["best"],
                }
                if (row := rows.get((setting, method)))
                else {"accuracy": "–", "diff": "", "verdict": "", "best": False}
                for method in study.methods
            ],
        }
        for setting in study.settings
    ]


def _run(run: Run) -> dict[str, str]:
    accuracy, seconds = number(run.summary, "test", "accuracy"), number(run.summary, "seconds")
    used, expected = number(run.summary, "replies_used"), number(run.summary, "replies_expected")
    return {
        "setting": run.setting,
        "method": run.label,
        "seed": str(run.seed),
        "status": run.status,
        "accuracy": "–" if accuracy is None else f"{100 * accuracy:.1f}",
        "replies": "–" if used is None or expected is None else f"{used:.0f} of {expected:.0f}",
        "seconds": "–" if seconds is None else f"{seconds:,.0f}",
        "weights": str(run.summary.get("weights_sha256") or "–")[:12],
    }


def _troubles(study: Study) -> list[dict[str, str]]:
    """Runs that did not complete, with what is known of the reason, and files that could not be read."""
    found = []
    for run in (*study.runs, *study.lost):
        reasons = [str(run.summary[key]) for key in ("error", "reason") if run.summary.get(key)] + list(run.problems)
        if run.status != "completed" or not run.usable or reasons:
            where = {"setting": run.setting, "method": run.label, "seed": str(run.seed), "status": run.status}
            found.append(where | {"reason": "; ".join(reasons) or "no reason recorded"})
    return found


def _events(study: Study) -> list[dict[str, str]]:
    found = []
    for run in study.runs:
        events = run.manifest.get("events")
        for event in events if isinstance(events, list) else []:
            if isinstance(event, Mapping):
                told = {key: _text(event.get(key)) for key in ("round", "kind", "client", "reason", "decision")}
                found.append({"setting": run.setting, "method": run.label, "seed": str(run.seed)} | told)
    return found


def _text(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _provenance_line(study: Study) -> str:
    started = sorted(str(run.manifest["started"]) for run in study.runs if run.manifest.get("started"))
    ended = sorted(str(run.manifest["ended"]) for run in study.runs if run.manifest.get("ended"))
    seeds = f"seeds {', '.join(map(str, study.seeds))}"
    times = [f"started {started[0][:16].replace('T', ' ')}"] if started else []
    times += [f"ended {ended[-1][:16].replace('T', ' ')}"] if ended else []
    return " · ".join([", ".join(source.name or str(source) for source in study.sources), seeds, *times])


def _provenance(study: Study) -> list[tuple[str, str]]:
    """Name and value of what the results depend on; a value that differs between runs is listed with all its forms."""
    lines: dict[str, list[str]] = {}

    def add(name: str, value: object) -> None:
        text = _text(value)
        if text != "–" and text not in lines.setdefault(name, []):
            lines[name].append(text)

    for run in study.runs:
        data = run.manifest.get("data")
        digest = data.get("sha256") if isinstance(data, Mapping) else run.manifest.get("data_sha256")
        add(f"data {data_name(run.manifest) or ''}".strip(), f"sha256 {digest}" if digest else None)
        versions = run.manifest.get("versions")
        for name, version in versions.items() if isinstance(versions, Mapping) else []:
            add(str(name), version)
        add("hardware", run.manifest.get("hardware"))
    add("seeds", [str(seed) for seed in study.seeds])
    return [(name, "; ".join(values)) for name, values in lines.items() if values]


def _commands(study: Study) -> list[str]:
    """Commands that reproduce the runs: the recorded ones, or else one per method from its resolved configuration."""
    recorded = {str(run.manifest["command"]): None for run in study.runs if run.manifest.get("command")}
    if recorded:
        return list(recorded)
    first = {(run.setting, run.label): run for run in reversed(study.runs) if run.status != "not run"}
    return [f"fedmm run {run.path / 'config.yaml'} --out again/{run.path.name}" for run in reversed(first.values())]
