"""Pictures of what changes over rounds: accuracies, imbalance, traffic. Each function returns `Picture`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from experiments.report.measures import OBSERVED, Measure
from experiments.report.read import Run, Study
from experiments.report.svg import (
    METHODS,
    MUTED,
    PAIR,
    Array,
    Picture,
    canvas,
    every,
    label_axes,
    method_colour,
    panel_width,
    short,
    style,
    to_svg,
)

COLLAPSED = 0.01
"""Share of its own maximum under which the spread of an encoder's features counts as collapse."""

UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
"""Of simulated time; the first of which a run takes two or more is shown."""


def slots(study: Study) -> dict[str, int]:
    """Colour slot of each method, the same in every figure; the baseline has slot 0, a neutral grey."""
    others = [m for m in study.methods if m != study.baseline]
    return {m: 0 if m == study.baseline else 1 + others.index(m) % (METHODS - 1) for m in study.methods}


def series(runs: Sequence[Run], split: str, modality: str, metric: str) -> pd.DataFrame:
    """A global metric over rounds: index round, one column a seed; nan where a seed has no value."""
    key = (split, modality, metric)
    columns = {run.seed: run.curves[key] for run in runs if key in run.curves}
    return pd.DataFrame(columns).sort_index()


def feature_spread(runs: Sequence[Run], modality: str) -> pd.DataFrame:
    """Standard deviation of an encoder's features over rounds, on validation data or else on training data."""
    held = series(runs, "val", modality, "feature_std")
    return held if len(held) else series(runs, "train", modality, "feature_std")


def gap(runs: Sequence[Run], modalities: Sequence[str]) -> pd.DataFrame:
    """Spread of the modalities' masked validation accuracies over rounds: highest minus lowest; one column a seed."""
    parts = [series(runs, "val", m, "accuracy_masked") for m in modalities]
    stacked = pd.concat({m: p for m, p in zip(modalities, parts, strict=True) if len(p)} or {"": pd.DataFrame()})
    if len(modalities) < 2 or not len(stacked):
        return pd.DataFrame()
    by_round = stacked.groupby(level=1)
    return by_round.max() - by_round.min()


def traffic(run: Run) -> pd.Series[float]:
    """Megabytes sent up and down until the end of each round."""
    rows = run.metrics[(run.metrics["scope"] == "block") & run.metrics["metric"].isin(["bytes_up", "bytes_down"])]
    rows = rows.drop_duplicates(["round", "client", "modality", "metric"], keep="last")
    return rows.groupby("round")["value"].sum().cumsum() / 1e6


def simulated_seconds(run: Run) -> pd.Series[float]:
    """Simulated seconds at the end of each round; empty without simulated devices."""
    found = series([run], "train", "fused", "simulated_seconds")
    return found.iloc[:, 0] if len(found) else pd.Series(dtype=float)


def accuracy_curves(study: Study, setting: str, prefix: str) -> Picture | None:
    """Fused validation accuracy over rounds, with the reference lines."""
    curves = {m: series(study.of(setting, m), "val", "fused", "accuracy") for m in study.methods}
    references = {name: float(np.mean(a)) for name, a in study.references.get(setting, {}).items() if a}
    extra = " Dotted: test accuracy of the reference lines." if references else ""
    return _curves(
        study,
        curves,
        prefix,
        "Fused accuracy over rounds",
        "validation accuracy, %",
        scale=100,
        references=references,
        caption="Fused prediction; line: mean over seeds, band: lowest to highest seed." + extra,
    )


def modality_curves(study: Study, setting: str, prefix: str) -> list[Picture]:
    """Each modality's validation accuracy over rounds, as small multiples on one scale."""
    found: dict[str, tuple[str, dict[str, pd.DataFrame]]] = {}
    for modality in study.modalities(setting):
        for metric, how in (
            ("accuracy_masked", "with the other modalities masked"),
            ("accuracy_head", "by its own head"),
        ):
            curves = {m: series(study.of(setting, m), "val", modality, metric) for m in study.methods}
            if any(len(c) for c in curves.values()):
                found[modality] = how, curves
                break
    values = np.concatenate([c.to_numpy().ravel() for _, cs in found.values() for c in cs.values()] or [np.zeros(1)])
    limits = _limits(100 * values)
    pictures = [
        _curves(
            study,
            curves,
            f"{prefix}-{at}",
            modality,
            "validation accuracy, %",
            scale=100,
            limits=limits,
            width=panel_width(len(found)),
            caption=f"Validation accuracy of {modality} {how}.",
        )
        for at, (modality, (how, curves)) in enumerate(found.items())
    ]
    return [p for p in pictures if p]


def imbalance_curves(study: Study, setting: str, prefix: str) -> list[Picture]:
    """Imbalance ratio, gap between the modalities, and the spread of each encoder's features, over rounds."""
    modalities = study.modalities(setting)
    ratio = {m: series(study.of(setting, m), "train", "fused", "imbalance_ratio") for m in study.methods}
    gaps = {m: gap(study.of(setting, m), modalities) for m in study.methods}
    spreads = {m: {label: feature_spread(study.of(setting, label), m) for label in study.methods} for m in modalities}
    width = panel_width(sum(any(len(c) for c in curves.values()) for curves in (ratio, gaps, *spreads.values())))
    pictures = [
        _curves(
            study,
            ratio,
            f"{prefix}-ratio",
            "Imbalance ratio",
            "ratio",
            level=1.0,
            width=width,
            caption="Imbalance ratio that the clients report, where the method measures it; 1 is balance.",
        ),
        _curves(
            study,
            gaps,
            f"{prefix}-gap",
            "Modality gap",
            "points",
            scale=100,
            level=0.0,
            width=width,
            caption="Strongest minus weakest modality, by masked validation accuracy.",
        ),
    ]
    pictures += [
        _curves(
            study,
            curves,
            f"{prefix}-std{at}",
            f"Feature spread, {modality}",
            "standard deviation",
            level=0.0,
            width=width,
            caption=f"Mean standard deviation of the {modality} encoder's features; 0 means collapse.",
        )
        for at, (modality, curves) in enumerate(spreads.items())
    ]
    return [p for p in pictures if p]


def observatory_curves(study: Study, setting: str, prefix: str) -> list[Picture]:
    """What the observatory saw of each modality over rounds, one picture a measure and modality; none without it."""
    seen: list[tuple[Measure, str, dict[str, pd.DataFrame]]] = []
    for measure in OBSERVED:
        for modality in study.modalities(setting):
            curves = {m: _observed(study.of(setting, m), modality, measure.metric) for m in study.methods}
            if any(len(c) for c in curves.values()):
                seen.append((measure, modality, curves))
    pictures = []
    for at, (measure, modality, curves) in enumerate(seen):
        # One scale for a measure's modalities, the level of reference in it.
        alike = [c.to_numpy().ravel() for other, _, found in seen if other is measure for c in found.values()]
        level = [] if measure.level is None else [np.array([measure.level])]
        values = np.concatenate([*(measure.scale * a for a in alike), *level])
        picture = _curves(
            study,
            curves,
            f"{prefix}-{at}",
            f"{measure.title}, {modality}",
            measure.axis,
            caption=measure.caption.format(modality),
            scale=measure.scale,
            limits=_limits(values, 0.5 if measure.scale > 1 else 0.02),
            level=measure.level,
            width=panel_width(len(seen)),
        )
        pictures += [picture] if picture else []
    return pictures


def _observed(runs: Sequence[Run], modality: str, metric: str) -> pd.DataFrame:
    """A figure of the observatory, on validation data or else on training data."""
    held = series(runs, "val", modality, metric)
    return held if len(held) else series(runs, "train", modality, metric)


def traffic_curves(study: Study, setting: str, prefix: str) -> Picture | None:
    """Fused validation accuracy against the megabytes spent."""
    curves = {m: _accuracy_against(study.of(setting, m), traffic) for m in study.methods}
    return _curves(
        study,
        curves,
        prefix,
        "Accuracy against traffic",
        "validation accuracy, %",
        scale=100,
        x="MB, up and down",
        caption="Fused validation accuracy against all bytes sent so far, mean over seeds. Further left is cheaper.",
    )


def time_curves(study: Study, setting: str, prefix: str) -> Picture | None:
    """Fused validation accuracy against simulated time; none without simulated devices."""
    every_run = [simulated_seconds(run) for run in study.of(setting)]
    longest = max((float(seconds.max()) for seconds in every_run if len(seconds)), default=0.0)
    unit, size = next((u, s) for u, s in UNITS if longest >= 2 * s or s == 1)
    curves = {m: _accuracy_against(study.of(setting, m), lambda r: simulated_seconds(r) / size) for m in study.methods}
    return _curves(
        study,
        curves,
        prefix,
        "Accuracy against simulated time",
        "validation accuracy, %",
        scale=100,
        x=f"simulated time, {unit}",
        caption="Fused validation accuracy against the simulated time of the devices, mean over seeds. Further left is "
        "faster.",
    )


def _accuracy_against(runs: Sequence[Run], spent: Callable[[Run], pd.Series[float]]) -> pd.DataFrame:
    """Mean accuracy over seeds, indexed by the mean of what each round had cost until its end."""
    parts = []
    for run in runs:
        accuracy, cost = series([run], "val", "fused", "accuracy"), spent(run)
        if len(accuracy) and len(cost):
            parts.append(pd.DataFrame({"x": cost, "y": accuracy.iloc[:, 0]}).dropna())
    if not parts:
        return pd.DataFrame()
    mean = pd.concat(parts).groupby(level=0).mean()
    return pd.DataFrame({"mean": mean["y"].to_numpy()}, index=mean["x"].to_numpy())


def _curves(
    study: Study,
    curves: Mapping[str, pd.DataFrame],
    prefix: str,
    title: str,
    y: str,
    *,
    caption: str,
    x: str = "round",
    scale: float = 1,
    limits: tuple[float, float] | None = None,
    level: float | None = None,
    references: Mapping[str, float] | None = None,
    width: float = PAIR,
) -> Picture | None:
    curves = {m: c.dropna(how="all") for m, c in curves.items() if len(c.dropna(how="all"))}
    if not curves:
        return None
    slot = slots(study)
    with style():
        figure, axes = canvas(width, 0.62 * width)
        last = []
        for method, curve in curves.items():
            curve = scale * curve.loc[every(list(curve.index))]
            at, mean = curve.index.to_numpy(), curve.mean(axis=1).to_numpy()
            colour = method_colour(slot[method])
            if curve.shape[1] > 1:
                low, high = curve.min(axis=1).to_numpy(), curve.max(axis=1).to_numpy()
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            alone = "o" if len(at) == 1 else ""
            dash = "-" if slot[method] < 6 else (0, (4, 1.5))
            axes.plot(at, mean, color=colour, marker=alone, markersize=4, linestyle=dash)
            last.append(f"{method} {mean[-1]:.{1 if scale > 1 else 3}f}")
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=0.8)
        for name, value in (references or {}).items():
            axes.axhline(scale * value, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(
                short(name, 22),
                (1, scale * value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
                color=MUTED,
            )
        if limits is not None:
            axes.set_ylim(*limits)
        if x == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        label_axes(axes, x, y)
        alt = f"{title}: {y} over {x}. At the end: {', '.join(last)}."
        return Picture(to_svg(figure, prefix=prefix, alt=alt), title, caption)


def collapsed(run: Run, modality: str) -> bool:
    """Whether the spread of a modality's features ended below 1 % of its own maximum."""
    spread = feature_spread([run], modality).to_numpy().ravel()
    spread = spread[np.isfinite(spread)]
    return bool(len(spread)) and bool(spread[-1] <= COLLAPSED * spread.max())


def _limits(values: Array, margin: float = 0.5) -> tuple[float, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    pad = max(0.04 * float(values.max() - values.min()), margin)
    return float(values.min()) - pad, float(values.max()) + pad
