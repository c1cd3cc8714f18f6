"""The comparison table: its numbers as a DataFrame, and its text for Markdown, LaTeX, HTML and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.report.read import Run, Study, number
from fedmm.stats import MAX_FLIPS, Paired, holm, mean_interval, paired_interval, sign_flip_p

LEVEL = 0.95
KINDS = ("probe", "masked", "head")
"""How a modality's accuracy is measured: linear probe on its encoder, fused model with the others masked, own head."""

VERDICTS = {
    "above": "above",
    "below": "below",
    "none": "not significant",
    "holm": "not after Holm",
    "one": "one seed",
    "baseline": "baseline",
    "": "",
}
"""What a paired difference allows one to say, by key of the `verdict` column."""


@dataclass(frozen=True)
class Column:
    """One shown column: its header, the explanation of the header, and how a row becomes text."""

    header: str
    title: str
    text: Callable[[Any], str]


def comparison_table(study: Study) -> pd.DataFrame:
    """Aggregate the usable runs of a study into one row per setting and method, then one per reference line.

    Accuracies, differences and macro-F1 are shares (0 to 1); `*_low`, `*_high` bound 95 % Student t intervals and
    are nan for one seed. `diff*` is the difference to the baseline over the seeds that both have finished;
    `p` its paired t test, `p_holm` adjusted over the methods of the setting, `p_flip` the exact sign-flip test.
    `weak*` is the same difference for the modality that is weakest under the baseline (probe, else masked accuracy).
    """
    rows: list[dict[str, Any]] = []
    for setting in study.settings:
        block = [_row(study, setting, label) for label in study.methods if study.of(setting, label)]
        for key in ("p", "weak_p"):
            for row, adjusted in zip(block, holm([row[key] for row in block]), strict=True):
                row[f"{key}_holm"] = adjusted
        for row in block:
            row["verdict"] = _verdict(row)
        rows += block + [_reference(setting, name, a) for name, a in study.references.get(setting, {}).items()]
    table = pd.DataFrame(rows)
    return table.assign(best=_best(table)) if len(table) else table


def _row(study: Study, setting: str, label: str) -> dict[str, Any]:
    runs = study.of(setting, label)
    usable = [run for run in runs if run.usable]
    row: dict[str, Any] = {"setting": setting, "method": label, "kind": "method", "seeds": len(usable)}
    row["unfinished"] = len(runs) - len(usable)
    for name in ("accuracy", "macro_f1"):
        row |= _mean(name, usable, "test", name)
    for modality in study.modalities(setting):
        for kind in KINDS:
            row |= _mean(f"{modality}_{kind}", usable, "test", "per_modality", modality, kind)
    row |= _mean("modality_gap", usable, "modality_gap")
    base = [r for r in study.of(setting, study.baseline) if r.usable] if study.baseline else []
    row["is_baseline"] = label == study.baseline
    row |= _difference("diff", "p", usable, base, ("test", "accuracy"))
    weak, path = _weakest(study, setting, base)
    row["weak_modality"] = weak
    row |= _difference("weak", "weak_p", usable, base, path)
    for name, key, scale in (("mb_up", "bytes_up", 1e6), ("mb_down", "bytes_down", 1e6), ("seconds", "seconds", 1.0)):
        values = _values(usable, key)
        row[name] = sum(values) / len(values) / scale if values else math.nan
    return row


def _values(runs: Iterable[Run], *keys: str) -> list[float]:
    return [value for run in runs if (value := number(run.summary, *keys)) is not None]


def _mean(name: str, runs: Sequence[Run], *keys: str) -> dict[str, float]:
    interval = mean_interval(_values(runs, *keys), LEVEL)
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _difference(
    name: str, p: str, runs: Sequence[Run], base: Sequence[Run], keys: tuple[str, ...]
) -> dict[str, float | int]:
    ours = {run.seed: value for run in runs if (value := number(run.summary, *keys)) is not None}
    theirs = {run.seed: value for run in base if (value := number(run.summary, *keys)) is not None}
    shared = sorted(ours.keys() & theirs.keys()) if keys and {r.label for r in runs} != {r.label for r in base} else []
    a, b = [ours[s] for s in shared], [theirs[s] for s in shared]
    found = paired_interval(a, b, LEVEL) if shared else Paired(math.nan, math.nan, math.nan, 0, math.nan)
    flip = [x - y for x, y in zip(a, b, strict=True)]
    return {
        name: found.mean,
        f"{name}_low": found.low,
        f"{name}_high": found.high,
        f"{name}_pairs": found.n,
        p: found.p,
        f"{p}_flip": sign_flip_p(flip) if 2 <= len(flip) <= MAX_FLIPS else math.nan,
    }


def _weakest(study: Study, setting: str, base: Sequence[Run]) -> tuple[str, tuple[str, ...]]:
    for kind in KINDS:
        paths = {m: ("test", "per_modality", m, kind) for m in study.modalities(setting)}
        means = {m: sum(v) / len(v) for m, path in paths.items() if (v := _values(base, *path))}
        if len(means) > 1:
            weak = min(means, key=lambda m: means[m])
            return weak, paths[weak]
    return "", ()


def _verdict(row: dict[str, Any]) -> str:
    if row["is_baseline"]:
        return "baseline"
    if row["diff_pairs"] < 2:
        return "one" if row["diff_pairs"] == 1 else ""
    if row["diff_low"] <= 0 <= row["diff_high"]:
        return "none"
    if row["p_holm"] >= 1 - LEVEL:
        return "holm"
    return "above" if row["diff"] > 0 else "below"


def _reference(setting: str, name: str, accuracies: tuple[float, ...]) -> dict[str, Any]:
    found = mean_interval(accuracies, LEVEL)
    row = {"setting": setting, "method": name, "kind": "reference", "seeds": found.n, "verdict": ""}
    return row | {"accuracy": found.mean, "accuracy_low": found.low, "accuracy_high": found.high, "is_baseline": False}


def _best(table: pd.DataFrame) -> list[bool]:
    """True for the highest mean of a setting, if it is clear of the baseline (or it is the baseline, clear of all)."""
    best = [False] * len(table)
    rows = table.to_dict("records")
    for setting in table["setting"].unique():
        block = [
            (row["accuracy"], at)
            for at, row in enumerate(rows)
            if row["setting"] == setting and row["kind"] == "method" and not math.isnan(row["accuracy"])
        ]
        if block:
            top = max(block)[1]
            others = [rows[at]["verdict"] for _, at in block if at != top]
            beaten = bool(others) and all(verdict == "below" for verdict in others)
            best[top] = rows[top]["verdict"] == "above" or (rows[top]["is_baseline"] and beaten)
    return best


def percent(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share in percent with one decimal, with the half-width of its interval if it has one: "71.2 ± 0.8"."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f}" + ("" if math.isnan(low) else f" ± {50 * (high - low):.1f}")


def points(value: float, low: float = math.nan, high: float = math.nan) -> str:
    """A difference of shares in percentage points with its interval: "+4.2 [1.1, 7.3]"."""
    if math.isnan(value):
        return "–"
    bounds = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{_signed(value)}{bounds}".replace("-", "−")


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def p_value(value: float) -> str:
    """A p-value with three decimals, four where three would hide on which side of 0.05 it lies."""
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.4f}" if abs(value - 0.05) < 5e-4 else f"{value:.3f}"


def _plain(value: float, digits: int = 1) -> str:
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


def _share(name: str) -> Callable[[Any], str]:
    return lambda row: percent(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _seeds(row: Any) -> str:
    missing = row.get("unfinished")
    return f"{row['seeds']:.0f}" + (f" of {row['seeds'] + missing:.0f}" if missing and not pd.isna(missing) else "")


def columns(table: pd.DataFrame, *, setting: bool) -> list[Column]:
    """The columns to show: one for each number that at least one row has; `setting` adds the setting in front."""
    shown = [Column("Setting", "Setting", lambda row: str(row["setting"]))] if setting else []
    shown += [
        Column("Method", "Method or reference line", lambda row: str(row["method"])),
        Column("Accuracy %", "Fused test accuracy, mean ± 95 % interval over seeds", _share("accuracy")),
    ]
    if "diff" not in table:
        return shown
    if table["diff"].notna().any():
        shown += [
            Column(
                "Δ to baseline",
                "Paired difference to the baseline in points, with its 95 % interval",
                lambda row: points(row["diff"], row["diff_low"], row["diff_high"]),
            ),
            Column(
                "p (Holm)",
                "Paired t test, Holm-corrected over the methods of the setting",
                lambda row: p_value(row["p_holm"]),
            ),
            Column("Verdict", "What the difference allows one to say", lambda row: VERDICTS[row["verdict"]]),
        ]
    shown.append(Column("Macro-F1 %", "Fused test macro-F1, mean ± 95 % interval over seeds", _share("macro_f1")))
    what = {
        "probe": "linear probe on its encoder",
        "masked": "fused model, other modalities masked",
        "head": "own head",
    }
    for name in table.columns:
        modality, _, kind = str(name).rpartition("_")
        if modality and kind in KINDS and table[name].notna().any():
            title = f"Test accuracy of {modality} alone: {what[kind]}"
            shown.append(Column(f"{modality} ({kind}) %", title, _share(str(name))))
    shown += [
        Column("Gap", "Modality gap in points", lambda row: percent(row["modality_gap"])),
        Column("Seeds", "Seeds that reached the test, of those planned", _seeds),
        Column("MB up", "Megabytes from clients to server, mean of a run", lambda row: _plain(row["mb_up"])),
        Column("MB down", "Megabytes from server to clients, mean of a run", lambda row: _plain(row["mb_down"])),
        Column("Seconds", "Wall-clock seconds, mean of a run", lambda row: _plain(row["seconds"], 0)),
    ]
    return shown


def notes(study: Study, table: pd.DataFrame) -> list[str]:
    """What a reader of the table must know, in full sentences."""
    methods = table[table["kind"] == "method"] if len(table) else table
    found = ["Accuracies in percent; ± is half a 95 % Student t interval over seeds; – means that there is no number."]
    if study.baseline:
        found.append(
            f"Δ is the paired difference to {study.baseline} over equal seeds, in points, with its 95 % interval; p is "
            "the paired t test, Holm-corrected over the methods of a setting. A method is called above or below only "
            "where the interval is clear of zero and the corrected p is under 0.05."
        )
        found.append("Bold: highest mean of its setting and clear of the baseline, not of the second best.")
    else:
        found.append("No baseline among the methods, so no paired differences.")
    if len(methods) and (methods["seeds"] == 1).any():
        found.append("One seed gives no interval and no test: such a row is an example, not evidence.")
    small = methods.loc[methods["seeds"].between(2, 5), "seeds"] if len(methods) else methods
    if len(small):
        found.append(f"Rows with as few as {small.min():.0f} seeds have wide intervals; claims need at least 6 seeds.")
    if len(methods) and methods["unfinished"].sum():
        missing = int(methods["unfinished"].sum())
        found.append(f"{missing} run{'s' * (missing > 1)} did not reach the test: listed, not averaged.")
    return found


def to_markdown(study: Study, table: pd.DataFrame) -> str:
    """The table and its notes in Markdown."""
    shown = columns(table, setting=len(study.settings) > 1) if len(table) else []
    lines = ["| " + " | ".join(c.header for c in shown) + " |", "|" + " --- |" * len(shown)] if shown else ["No runs."]
    for _, row in table.iterrows():
        cells = [c.text(row).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for c in shown]
        if row["best"]:
            at = [c.header for c in shown].index("Accuracy %")
            cells[at] = f"**{cells[at]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes(study, table))])


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
    }
    | {"−": "$-$", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$", "\n": " "}
)


def _alignment(shown: Sequence[Column]) -> str:
    return "".join("l" if c.header in ("Setting", "Method", "Verdict") else "r" for c in shown) or "l"


def to_latex(study: Study, table: pd.DataFrame) -> str:
    """The table as a LaTeX `tabular` for the booktabs package, notes as comments."""
    shown = columns(table, setting=len(study.settings) > 1) if len(table) else []
    lines = [f"% {note}" for note in notes(study, table)]
    lines += [rf"\begin{{tabular}}{{{_alignment(shown)}}}", r"\toprule"]
    lines += [" & ".join(c.header.translate(_TEX) for c in shown) + r" \\", r"\midrule"]
    last = None
    for _, row in table.iterrows():
        if last not in (None, row["setting"]):
            lines.append(r"\midrule")
        last = row["setting"]
        cells = [c.text(row).translate(_TEX) for c in shown]
        if row["best"]:
            at = [c.header for c in shown].index("Accuracy %")
            cells[at] = rf"\textbf{{{cells[at]}}}"
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def print_table(study: Study, table: pd.DataFrame, console: Console) -> None:
    """Print the comparison to a terminal, one table a setting, with the columns that 80 characters have room for."""
    for setting in study.settings:
        block = table[table["setting"] == setting] if len(table) else table
        if not len(block):
            continue
        every = columns(block, setting=False)
        kind = next((k for k in KINDS if any(c.header.endswith(f"({k}) %") for c in every)), KINDS[0])
        brief = ("Method", "Accuracy %", "Δ to baseline", "Verdict", "Seeds")
        shown = [c for c in every if c.header in brief or c.header.endswith(f"({kind}) %")]
        # The intervals of single modalities are in the files.
        texts = [
            [c.text(row) if c.header in brief else c.text(row).split(" ± ")[0] for c in shown]
            for _, row in block.iterrows()
        ]
        screen = Table(
            title=Text(setting),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for at, column in enumerate(shown):
            # Words may be set in lines, numbers may not.
            parts = [line[at].split() if column.header == "Verdict" else [line[at]] for line in texts]
            width = max(len(part) for line in parts for part in line or [""]) if at else 10
            header = Text(column.header.replace(" (", "\n("))
            screen.add_column(header, justify="right" if at else "left", min_width=width)
        for (_, row), line in zip(block.iterrows(), texts, strict=True):
            style = "bold" if row["best"] else "dim" if row["kind"] == "reference" else ""
            screen.add_row(*map(Text, line), style=style)
        console.print(screen)
    for note in notes(study, table):
        console.print(Text(note), style="dim")
