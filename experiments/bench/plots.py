"""Pictures of the benchmark: rounds as bars, growth as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.bench.figures import spread
from experiments.bench.suites import Suite
from experiments.bench.tables import Record, values
from experiments.bench.workloads import Workload

COLOURS = ("#4c566a", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#8c564b", "#999999")
LABELS = {"sampled": "clients a round", "registered": "registered clients", "samples": "samples a client"}


def draw(suite: Suite, records: Sequence[Record], path: Path) -> bool:
    """Draw a suite's rounds (and, where clients grow, memory) into an SVG file; False if nothing was measured."""
    mine = [r for r in records if r["suite"] == suite.name]
    if not any(not r["error"] for r in mine):
        return False
    keys = [("seconds", "seconds a round")]
    if suite.axis in ("registered", "sampled", "parameters"):
        keys.append(("memory_mb", "MB of all processes"))
    figure = Figure(figsize=(6.4 * len(keys), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, title) in enumerate(keys, 1):
        axes = figure.add_subplot(1, len(keys), place)
        (_lines if suite.axis else _bars)(axes, suite, mine, key)
        axes.set_yscale("log")
        axes.set_ylabel(title)
        axes.grid(axis="y", which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(suite.title)
    figure.savefig(path, metadata={"Date": None})
    return True


def _bars(axes: Axes, suite: Suite, records: Sequence[Record], key: str) -> None:
    width = 0.8 / len(suite.contestants)
    for i, contestant in enumerate(suite.contestants):
        for j, workload in enumerate(suite.workloads):
            if found := values(records, workload.name, contestant.name, key):
                s = spread(found)
                axes.bar(
                    j - 0.4 + (i + 0.5) * width,
                    s.median,
                    width,
                    color=COLOURS[i % len(COLOURS)],
                    label=contestant.name if j == 0 else None,
                    yerr=[[s.median - s.low], [s.high - s.median]],
                    error_kw={"linewidth": 0.8},
                )
    axes.set_xticks(range(len(suite.workloads)), [w.name for w in suite.workloads])


def _lines(axes: Axes, suite: Suite, records: Sequence[Record], key: str) -> None:
    for i, contestant in enumerate(suite.contestants):
        points = []
        for workload in suite.workloads:
            if found := values(records, workload.name, contestant.name, key):
                points.append((_place(workload, suite, records), spread(found)))
        if points:
            axes.errorbar(
                [x for x, _ in points],
                [s.median for _, s in points],
                yerr=[[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]],
                color=COLOURS[i % len(COLOURS)],
                marker="o",
                markersize=4,
                label=contestant.name,
            )
    axes.set_xscale("log")
    axes.set_xlabel(LABELS.get(suite.axis, suite.axis))


def _place(workload: Workload, suite: Suite, records: Sequence[Record]) -> float:
    if suite.axis == "parameters":
        return next(float(r["parameters"]) for r in records if r["workload"] == workload.name and not r["error"])
    return float(getattr(workload, suite.axis))
