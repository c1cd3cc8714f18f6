"""Figures from confusion counts [C, C] (rows: truth), which add up over clients to the pooled figure exactly."""

from __future__ import annotations

from torch import Tensor


def accuracy(confusion: Tensor) -> float:
    """Share of samples on the diagonal; nan without samples."""
    total = float(confusion.sum())
    return float(confusion.diagonal().sum()) / total if total else float("nan")


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 over classes that occur in truth or prediction; nan without samples."""
    hit = confusion.diagonal()
    size = confusion.sum(0) + confusion.sum(1)
    shown = size > 0
    return float((2 * hit[shown] / size[shown]).mean()) if bool(shown.any()) else float("nan")
