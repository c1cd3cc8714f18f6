"""Pictures of the federation (who was selected, who holds what, whom the model serves) and of paired differences."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.curves import slots
from experiments.report.read import Run, Study
from experiments.report.svg import (
    MUTED,
    PAIR,
    PAPER,
    Array,
    Picture,
    canvas,
    label_axes,
    method_colour,
    modality_colour,
    panel_width,
    rectangles,
    short,
    style,
    to_svg,
)

CROWD = 120
"""Most clients that get a row of their own."""

HEAT, SHADES = ("accuracy", "accuracy_masked"), 10
"""What a client's row shows, of the fused prediction and of each modality, and in how many steps of colour."""


def selection(study: Study, setting: str, prefix: str) -> list[Picture]:
    """For each method: which client trained which modality in which round, for the first seed that has it."""
    modalities = study.modalities(setting)
    found: dict[str, tuple[Run, pd.DataFrame]] = {}
    for run in study.of(setting):
        rows = run.metrics[(run.metrics["scope"] == "client") & (run.metrics["metric"] == "selected")]
        rows = rows[(rows["value"] > 0) & rows["modality"].isin(modalities)]
        if len(rows):
            found.setdefault(run.label, (run, rows))
    width = panel_width(len(found))
    return [_selection(run, rows, modalities, f"{prefix}-{at}", width) for at, (run, rows) in enumerate(found.values())]


def _selection(run: Run, rows: pd.DataFrame, modalities: Sequence[str], prefix: str, width: float) -> Picture:
    owned = _owned(run)
    clients = max(int(rows["client"].max()) + 1, len(owned))
    first, last = int(rows["round"].min()), int(run.metrics["round"].max())
    crowd = clients > CROWD
    # In a crowd a row is thinner than a pixel; marks keep a visible height and the pale ownership is left out.
    strip = clients / 300 if crowd else 0.86 / len(modalities)
    with style():
        figure, axes = canvas(width, min(100 + 7.5 * clients, 440))
        for at, modality in enumerate(modalities):
            offset = 0.0 if crowd else (at + 0.5) * strip - 0.43
            owners = _owners([] if crowd else owned, modality)
            middle, span = np.full(len(owners), (first + last) / 2), np.full(len(owners), last - first + 1.0)
            rectangles(axes, middle, owners + offset, span, np.full(len(owners), strip), modality_colour(at), 0.13)
            mine = rows[rows["modality"] == modality]
            x, y = mine["round"].to_numpy(np.float64), mine["client"].to_numpy(np.float64) + offset
            rectangles(axes, x, y, np.full(len(x), 0.86), np.full(len(x), strip), modality_colour(at))
        axes.set(xlim=(first - 0.5, last + 0.5), ylim=(clients - 0.5, -0.5))
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        label_axes(axes, "round", "client")
        counts = ", ".join(f"{m} {int((rows['modality'] == m).sum())} times" for m in modalities)
        alt = f"Selection under {run.label}, seed {run.seed}: trained {counts} in {last} rounds, {clients} clients."
        svg = to_svg(figure, prefix=prefix, alt=alt)
    key = "" if crowd else " Pale: the client owns it. Full: it trained it."
    return Picture(svg, run.label, f"Seed {run.seed}: trained {counts}.{key}")


def partition(study: Study, setting: str, prefix: str) -> Picture | None:
    """Training samples by client and class, and the modalities of each client, for the first seed that has them."""
    modalities = study.modalities(setting)
    for run in study.of(setting):
        counts = _counts(run)
        if counts.size:
            classes = (_federation(run).get("classes") or []) if counts.ndim == 2 else []
            names = [short(str(c), 12) for c in classes] or [str(c) for c in range(counts.shape[1])]
            return _partition(run, counts, names, modalities, prefix)
    return None


def _partition(run: Run, counts: Array, names: list[str], modalities: Sequence[str], prefix: str) -> Picture:
    everyone, counts = len(counts), counts[:CROWD]
    clients, classes = counts.shape
    owned = _owned(run)[:clients]
    totals = counts.sum(axis=1)
    with style():
        figure = Figure(figsize=(PAIR / 96, min(130 + 11 * clients, 560) / 96), dpi=96, layout="constrained")
        ratios = [0.16 * max(len(modalities), 1) / 2, 1, 0.22]
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=ratios)
        for at, modality in enumerate(modalities):
            owners = _owners(owned, modality)
            size = np.full(len(owners), 0.8)
            rectangles(left, np.full(len(owners), float(at)), owners, size, size, modality_colour(at))
        y, x = (a.ravel().astype(np.float64) for a in np.indices(counts.shape))
        side = 0.94 * np.sqrt(counts.ravel() / max(counts.max(), 1))
        rectangles(middle, x[side > 0], y[side > 0], side[side > 0], side[side > 0], MUTED)
        rectangles(right, totals / 2, np.arange(clients, dtype=np.float64), totals, np.full(clients, 0.7), MUTED)
        left.set(xlim=(-0.6, max(len(modalities), 1) - 0.4), ylim=(clients - 0.4, -0.6), xticks=[])
        left.set_ylabel("client")
        left.set_xlabel("owns")
        step = math.ceil(classes / 28)
        middle.set(xlim=(-0.6, classes - 0.4), xticks=range(0, classes, step))
        upright = 90 if max(map(len, names)) > 2 else 0
        middle.set_xticklabels(names[:classes:step], rotation=upright)
        middle.set_xlabel("class")
        right.set(xlim=(0, totals.max() * 1.05 if totals.max() > 0 else 1), xticks=[0, int(totals.max())])
        right.set_xlabel("samples")
        left.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        for axes in (left, middle, right):
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        middle.grid(visible=True, axis="both", alpha=0.6)
        alt = (
            f"Partition of seed {run.seed}: {clients} clients, {classes} classes, "
            f"{totals.min():.0f} to {totals.max():.0f} training samples a client."
        )
        svg = to_svg(figure, prefix=prefix, alt=alt)
    part = f", first {clients} of {everyone} clients" if everyone > clients else ""
    return Picture(
        svg,
        "Who holds what",
        f"Seed {run.seed}{part}. Left: owned modalities. Middle: the area of a mark is the number of training samples "
        f"of that class; the largest is {counts.max():.0f}. Right: samples a client.",
    )


def heat(study: Study, setting: str, prefix: str) -> list[Picture]:
    """For each method: accuracy by client and modality in the last observation of the first seed that has one."""
    modalities = study.modalities(setting)
    found: dict[str, tuple[Run, pd.DataFrame]] = {}
    for run in study.of(setting):
        rows = run.metrics[(run.metrics["scope"] == "client") & (run.metrics["split"] != "test")]
        rows = rows[rows["metric"].isin([*HEAT, "worst_decile"])]
        if len(rows):
            found.setdefault(run.label, (run, rows[rows["round"] == rows["round"].max()]))
    width = panel_width(len(found))
    return [
        _heat(run, rows, ["fused", *modalities], f"{prefix}-{at}", width)
        for at, (run, rows) in enumerate(found.values())
    ]


def _heat(run: Run, rows: pd.DataFrame, columns: Sequence[str], prefix: str, width: float) -> Picture:
    round_, everyone = int(rows["round"].iloc[0]), sorted(rows["client"].unique())
    clients = everyone[:CROWD]
    place = {k: at for at, k in enumerate(clients)}
    rows = rows[rows["client"].isin(clients)]
    cells = rows[rows["metric"].isin(HEAT) & rows["modality"].isin(columns)]
    worst = rows[rows["metric"] == "worst_decile"]["client"].map(place).to_numpy(np.float64)
    with style():
        figure, axes = canvas(width, min(110 + 11 * len(clients), 560))
        # Paths of a few shades keep the page small; a shade is a tenth of the scale.
        shades = np.clip(np.ceil(SHADES * cells["value"].to_numpy(np.float64)), 1, SHADES)
        x = cells["modality"].map({m: at for at, m in enumerate(columns)}).to_numpy(np.float64)
        y = cells["client"].map(place).to_numpy(np.float64)
        for column, colour in enumerate([MUTED, *(modality_colour(at) for at in range(len(columns) - 1))]):
            for shade in range(1, SHADES + 1):
                here = (x == column) & (shades == shade)
                size = np.full(int(here.sum()), 0.94)
                rectangles(axes, x[here], y[here], size, size, colour, shade / SHADES)
        axes.plot(np.full(len(worst), -0.72), worst, ">", color=MUTED, markersize=4, linestyle="none")
        axes.set(xlim=(-0.95, len(columns) - 0.4), ylim=(len(clients) - 0.4, -0.6))
        axes.set_xticks(range(len(columns)), [short(m, 14) for m in columns])
        step = max(1, -(-len(clients) // 12))
        axes.set_yticks(range(0, len(clients), step), [str(k) for k in clients[::step]])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        label_axes(axes, "", "client")
        means = cells.groupby("modality")["value"].mean()
        told = ", ".join(f"{m} {100 * means[m]:.1f} %" for m in columns if m in means)
        alt = f"Accuracy by client and modality under {run.label}, seed {run.seed}, round {round_}: mean {told}."
        svg = to_svg(figure, prefix=prefix, alt=alt)
    part = f", first {len(clients)} of {len(everyone)} clients" if len(everyone) > len(clients) else ""
    spread = f" Clients lie between {_extremes(cells)}." if (cells["modality"] == "fused").any() else ""
    return Picture(
        svg,
        run.label,
        f"Seed {run.seed}, round {round_}{part}: accuracy of the fused prediction, and of each modality with the "
        f"others masked; full colour is 100 %. Arrows: the tenth of the clients that the model serves worst.{spread}",
    )


def _extremes(cells: pd.DataFrame) -> str:
    served = cells[cells["modality"] == "fused"]["value"]
    return f"{100 * served.min():.1f} and {100 * served.max():.1f} %"


def differences(study: Study, table: pd.DataFrame, prefix: str) -> Picture | None:
    """Paired difference to the baseline of every method in every setting, with its interval."""
    rows = table[(table["kind"] == "method") & table["diff"].notna()] if "diff" in table else table
    if not len(rows):
        return None
    slot = slots(study)
    settings = [s for s in study.settings if s in set(rows["setting"])]
    heights, ticks, at = [], [], 0.0
    with style():
        figure, axes = canvas(PAIR, 70 + 15 * len(rows) + 12 * len(settings))
        for setting in settings:
            start = at
            for _, row in rows[rows["setting"] == setting].iterrows():
                colour = method_colour(slot[row["method"]])
                clear = row["verdict"] in ("above", "below")
                if not math.isnan(row["diff_low"]):
                    axes.plot([100 * row["diff_low"], 100 * row["diff_high"]], [at, at], color=colour, linewidth=2)
                face = colour if clear else PAPER
                axes.plot(100 * row["diff"], at, "o", color=colour, markerfacecolor=face, markersize=5.5)
                at += 1
            heights.append((start + at - 1) / 2)
            ticks.append("\n".join(textwrap.wrap(short(setting, 60), 24)))
            at += 0.8
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_yticks(heights, ticks)
        axes.set_ylim(at - 0.6, -0.7)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        label_axes(axes, f"points above {study.baseline}", "")
        alt = "; ".join(f"{r['method']} on {r['setting']} {100 * r['diff']:+.1f} points" for _, r in rows.iterrows())
        svg = to_svg(figure, prefix=prefix, alt=f"Difference of fused test accuracy to {study.baseline}: {alt}.")
    return Picture(
        svg,
        f"Difference to {study.baseline}",
        "Fused test accuracy: mean of the paired differences with 95 % intervals. "
        "Filled: clear of zero after Holm's correction; hollow: no significant difference.",
    )


def _federation(run: Run) -> Mapping[str, Any]:
    found = run.manifest.get("federation")
    return found if isinstance(found, Mapping) else {}


def _owned(run: Run) -> list[list[str]]:
    found = _federation(run).get("owned")
    return [[str(m) for m in names] for names in found] if isinstance(found, list) else []


def _owners(owned: Sequence[Sequence[str]], modality: str) -> Array:
    return np.array([k for k, names in enumerate(owned) if modality in names], dtype=np.float64)


def _counts(run: Run) -> Array:
    found = _federation(run).get("class_counts")
    rows = found.get("train") if isinstance(found, Mapping) else None
    try:
        counts = np.asarray(rows if rows else [], dtype=np.float64)
    except (TypeError, ValueError):
        return np.zeros((0, 0))
    return counts if counts.ndim == 2 else np.zeros((0, 0))
