"""Pictures of the benchmark: rounds as points with their range, growth as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from experiments.bench.figures import number, spread
from experiments.bench.results import Record
from experiments.bench.suites import Suite
from experiments.bench.tables import values
from experiments.bench.workloads import Workload

COLOURS = {"bare loop": "#4c566a", "inproc": "#0072b2", "ray": "#009e73", "Flower": "#d55e00", "pfl": "#cc79a7"}
MARKERS = {"cohort off": "v", "cohort on": "^"}
LABELS = {"sampled": "clients a round", "registered": "registered clients", "samples": "samples a client"}
GROWING = ("sampled", "registered", "parameters")
"""Axes along which memory is drawn too."""


def draw(suite: Suite, records: Sequence[Record], path: Path) -> bool:
    """Draw a suite's rounds (and, where clients or the model grow, memory); False if nothing was measured."""
    mine = [r for r in records if r["suite"] == suite.name and not r["error"]]
    if not mine:
        return False
    keys = [("seconds", "seconds a round")]
    if suite.axis in GROWING:
        keys.append(("memory_mb", "MB of all processes"))
    figure = Figure(figsize=(5.6 * len(keys) + 1.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (key, title) in enumerate(keys, 1):
        axes = figure.add_subplot(1, len(keys), place)
        places = _axis(axes, suite, mine)
        for i, contestant in enumerate(suite.contestants):
            _draw_one(axes, suite, mine, contestant.name, key, places, i)
        axes.set_ylabel(title)
        if key == "seconds":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: number(v)))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: number(v) if number(v)[-1] in "25" else ""))
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", which="both", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    figure.suptitle(suite.title)
    figure.savefig(path)
    return True


def _axis(axes: Axes, suite: Suite, records: Sequence[Record]) -> dict[str, float]:
    """Where each workload that was measured stands on the horizontal axis."""
    measured = [w for w in suite.workloads if any(r["workload"] == w.name for r in records)]
    if not suite.axis:
        axes.set_xticks(range(len(measured)), [w.name for w in measured])
        axes.set_xlim(-0.5, len(measured) - 0.5)
        return {w.name: float(i) for i, w in enumerate(measured)}
    places = {w.name: _size(w, suite, records) for w in measured}
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places.values()), [f"{v:,.0f}" for v in places.values()])
    axes.set_xlabel(LABELS.get(suite.axis, suite.axis))
    return places


def _size(workload: Workload, suite: Suite, records: Sequence[Record]) -> float:
    if suite.axis == "parameters":
        return next(float(r["parameters"]) for r in records if r["workload"] == workload.name)
    return float(getattr(workload, suite.axis))


def _draw_one(
    axes: Axes,
    suite: Suite,
    records: Sequence[Record],
    name: str,
    key: str,
    places: dict[str, float],
    position: int,
) -> None:
    found = [(x, values(records, workload, name, key)) for workload, x in places.items()]
    points = [(x, spread(v)) for x, v in found if v]
    if not points:
        return
    # Side by side where the axis has no meaning.
    shift = 0.0 if suite.axis else 0.8 * ((position + 0.5) / len(suite.contestants) - 0.5)
    kind = name.partition(", ")
    axes.errorbar(
        [x + shift for x, _ in points],
        [s.median for _, s in points],
        yerr=[[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]],
        color=COLOURS.get(kind[0].partition(" x")[0], "#999999"),
        marker=MARKERS.get(kind[2], "o"),
        markersize=5,
        linewidth=1.2,
        linestyle="-" if suite.axis else "",
        label=name,
    )
