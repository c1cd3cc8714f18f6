"""What the numbers say, in sentences. Every sentence is computed; none claims more than its interval allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.report.curves import collapsed
from experiments.report.read import Study
from experiments.report.table import p_value, points


@dataclass(frozen=True)
class Finding:
    """One sentence; `tone` is above, below, none (no difference shown) or warning."""

    text: str
    tone: str


def findings(study: Study, table: pd.DataFrame, setting: str) -> list[Finding]:
    """Sentences on one setting: each method against the baseline, its weak modality, collapse."""
    rows = table[(table["setting"] == setting) & (table["kind"] == "method")].to_dict("records") if len(table) else []
    compared = [row for row in rows if not row["is_baseline"] and not math.isnan(row["diff"])]
    found = [_difference(study, row) for row in compared]
    found += [f for row in compared if (f := _weak(study, row))]
    for modality in study.modalities(setting):
        for label in study.methods:
            runs = [run for run in study.of(setting, label) if len(run.metrics)]
            count = sum(collapsed(run, modality) for run in runs)
            if count:
                where = f"in {count} of {_count(len(runs), 'seed')}"
                found.append(Finding(f"The {modality} encoder of {label} collapsed on {setting} {where}.", "warning"))
    return found


def overview(study: Study, table: pd.DataFrame) -> list[Finding]:
    """Sentences on the whole study: each method's tally over settings, the setting itself if there is one, failures."""
    found: list[Finding] = []
    if len(study.settings) == 1:
        found += findings(study, table, study.settings[0])
    else:
        for label in study.methods:
            rows = table[(table["method"] == label) & (table["kind"] == "method")]
            if label != study.baseline and rows["diff"].notna().any():
                found.append(_tally(study, label, rows))
        lost = sum(
            any(collapsed(run, modality) for modality in study.modalities(run.setting))
            for run in study.runs
            if len(run.metrics)
        )
        if lost:
            text = f"An encoder collapsed in {lost} of {_count(len(study.runs), 'run')}; each setting names them."
            found.append(Finding(text, "warning"))
    if not study.baseline and len(study.methods) > 1:
        found.append(Finding("There is no baseline among the methods, so no differences are tested.", "none"))
    short = [run for run in study.runs if not run.usable]
    if short:
        text = f"{len(short)} of {_count(len(study.runs), 'run')} did not reach the test: listed, not averaged."
        found.append(Finding(text, "warning"))
    degraded = sum(run.status == "degraded" for run in study.runs)
    if degraded:
        text = f"{_count(degraded, 'run')} finished degraded: fewer clients than asked contributed. They are averaged."
        found.append(Finding(text, "warning"))
    return found


def what_ran(study: Study) -> str:
    """One sentence in plain words on what was run."""
    rounds = _range(study, lambda summary, _: summary.get("rounds"))
    clients = _range(study, lambda _, manifest: len((manifest.get("federation") or {}).get("owned") or []) or None)
    few = ", ".join(study.settings)
    parts = [
        f"{_count(len(study.methods), 'method')} ({', '.join(study.methods)})",
        f"on {_count(len(study.settings), 'setting')}" + (f" ({few})" if len(study.settings) <= 4 else ""),
        f"with {_count(len(study.seeds), 'seed')}",
    ]
    scale = [f"{clients} clients" if clients else "", f"{rounds} rounds" if rounds else ""]
    scale = [text for text in scale if text]
    size = f", {' and '.join(scale)} a run" if scale else ""
    done = sum(run.usable for run in study.runs)
    return f"{' '.join(parts)}{size}: {done} of {_count(len(study.runs), 'run')} reached the test."


def _difference(study: Study, row: Mapping[Any, Any]) -> Finding:
    label, setting = row["method"], row["setting"]
    way = f"{abs(100 * row['diff']):.1f} points {'above' if row['diff'] >= 0 else 'below'} {study.baseline}"
    if row["diff_pairs"] < 2:
        return Finding(
            f"{label} is {way} on {setting} in the one seed that both have; one seed gives no interval, "
            "so this is no evidence of a difference.",
            "none",
        )
    after = f"p = {p_value(row['p_holm'])} after Holm's correction, {row['diff_pairs']:.0f} seeds".replace("= <", "<")
    if row["verdict"] in ("above", "below"):
        return Finding(f"{label} is {way} {_bounds(row, 'diff')} on {setting} ({after}).", row["verdict"])
    return Finding(
        f"No significant difference between {label} and {study.baseline} on {setting}: "
        f"{points(row['diff'])} points {_bounds(row, 'diff', signed=True)} ({after}).",
        "none",
    )


def _weak(study: Study, row: Mapping[Any, Any]) -> Finding | None:
    """A sentence on the weak modality where its change is clear of zero after Holm's correction."""
    if row["weak_pairs"] < 2 or row["weak_low"] <= 0 <= row["weak_high"] or row["weak_p_holm"] >= 0.05:
        return None
    tone = "above" if row["weak"] > 0 else "below"
    return Finding(
        f"The weak modality, {row['weak_modality']}, is {abs(100 * row['weak']):.1f} points {tone} {study.baseline} "
        f"{_bounds(row, 'weak')} under {row['method']} on {row['setting']}.",
        tone,
    )


def _bounds(row: Mapping[Any, Any], name: str, *, signed: bool = False) -> str:
    low, high = 100 * row[f"{name}_low"], 100 * row[f"{name}_high"]
    if row[name] < 0 and not signed:
        low, high = -high, -low
    return f"[{low:.1f}, {high:.1f}]".replace("-", "−")


def _tally(study: Study, label: str, rows: pd.DataFrame) -> Finding:
    above, below = (int((rows["verdict"] == way).sum()) for way in ("above", "below"))
    same = int(rows["verdict"].isin(["none", "holm"]).sum())
    untested = len(rows) - above - below - same
    weak = rows[rows["weak"].notna()]
    up, down = (int(((weak["weak_p_holm"] < 0.05) & (sign * weak["weak"] > 0)).sum()) for sign in (1, -1))
    text = (
        f"{label}: above {study.baseline} on {above} of {_count(len(rows), 'setting')}, below on {below}, "
        f"no significant difference on {same}{f', untested on {untested}' if untested else ''}; "
        f"mean difference {points(rows['diff'].mean())} points."
    )
    if len(weak):
        text += f" Weak modality significantly up on {up} of {len(weak)}, down on {down}."
    return Finding(text, "above" if above > below else "below" if below > above else "none")


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" + ("" if n == 1 else "s")


def _range(study: Study, get: Any) -> str:
    values = sorted({v for run in study.runs if isinstance(v := get(run.summary, run.manifest), int)})
    if not values:
        return ""
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
