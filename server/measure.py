"""Validation, test and probes of the global model, from sums and counts that clients report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedmm.config.schema import ScenarioConfig
from fedmm.errors import RunError
from fedmm.io.run_directory import Row
from fedmm.metrics.classification import accuracy, macro_f1
from fedmm.metrics.local import solve_probe
from fedmm.types import Tensors
from server.facts import Federates

_KINDS = ("masked", "head", "probe")


def sources(
    scenario: ScenarioConfig, federates: Federates, sizes: Mapping[int, int], split: str
) -> tuple[list[int], list[tuple[str, ...]]]:
    """Clients that have samples in a split, and the modalities that these come with.

    Args:
        scenario: The run's.
        federates: Facts of the federation.
        sizes: Client -> samples in the split.
        split: Which split.
    """
    clients = [k for k, n in sizes.items() if n]
    complete = split != "train" and scenario.modalities.heldout == "complete"
    return clients, [federates.modalities if complete else federates.owned[k] for k in clients]


def figures(merged: Tensors, modalities: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1, loss and per-modality figures from merged evaluation reports.

    Args:
        merged: Sum of the clients' `fedmm.metrics.local.evaluate` reports.
        modalities: In slot order.

    Returns:
        accuracy, macro_f1, loss, per_modality: {m: {masked, head, probe, feature_std}} (None where not measured),
        modality_gap: largest minus smallest masked accuracy. `masked`: fused prediction with the other modalities
        absent; `head`: the modality's own head; `probe`: linear probe fitted on training features; `feature_std`:
        mean standard deviation of the encoder's features over samples (0: collapsed).

    Raises:
        RunError: There are no reports.
    """
    if "confusion" not in merged:
        raise RunError(
            "no client returned evaluation figures", where="evaluate", remedy="look at the events in manifest.json"
        )
    per_modality: dict[str, dict[str, float | None]] = {}
    for m in modalities:
        entry: dict[str, float | None] = {
            kind: accuracy(merged[f"{kind}.{m}"]) if f"{kind}.{m}" in merged else None for kind in _KINDS
        }
        if f"feature_sum.{m}" in merged:
            n = merged[f"feature_count.{m}"].clamp(min=1)
            variance = merged[f"feature_square.{m}"] / n - (merged[f"feature_sum.{m}"] / n).square()
            entry["feature_std"] = _digits(float(variance.clamp(min=0).sqrt().mean()))
        per_modality[m] = entry
    masked = [e["masked"] for e in per_modality.values() if e["masked"] is not None]
    return {
        "accuracy": accuracy(merged["confusion"]),
        "macro_f1": macro_f1(merged["confusion"]),
        "loss": _digits(float(merged["loss"] / merged["count"].clamp(min=1))),
        "per_modality": per_modality,
        "modality_gap": max(masked) - min(masked) if masked else None,
    }


def _digits(value: float) -> float:
    """Ten significant digits: the last ones depend on how many clients were measured together."""
    return float(f"{value:.10g}")


def figure_rows(round: int, split: str, values: dict[str, Any]) -> list[Row]:
    """Figures as tidy rows."""
    rows = [Row(round, split, "global", None, "fused", k, values[k]) for k in ("accuracy", "macro_f1", "loss")]
    if values["modality_gap"] is not None:
        rows.append(Row(round, split, "global", None, "fused", "modality_gap", values["modality_gap"]))
    for m, entry in values["per_modality"].items():
        for kind, value in entry.items():
            if value is not None:
                name = kind if kind == "feature_std" else f"accuracy_{kind}"
                rows.append(Row(round, split, "global", None, m, name, value))
    return rows


def fit_probes(merged: Tensors, modalities: Sequence[str]) -> Tensors:
    """Probe weights "probe.m" [d+1, C] from the clients' pooled second moments; exact, no sample leaves a client."""
    return {
        f"probe.{m}": torch.as_tensor(solve_probe(merged[f"gram.{m}"], merged[f"cross.{m}"]))
        for m in modalities
        if f"gram.{m}" in merged
    }
