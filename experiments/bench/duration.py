"""How long the benchmark will take: rough figures first, then what its own runs took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from experiments.bench.launch import Contestant
from experiments.bench.suites import BUDGET_S, Suite
from experiments.bench.workloads import Workload

CHECK_S = 6.0
"""A run of one round in the check that all compute the same."""

_START_S = {"ours": 4.0, "bare": 3.5, "flower": 12.0, "pfl": 3.5}
_REGISTERED_S = 1 / 1500  # to make the data of a client
_SAMPLE_S = {"mlp": 5e-5, "cnn": 5e-4}
_PARAMETER_S = 5e-9  # of a step: products of a batch, and the update
_MESSAGE_S = 0.012  # of Flower

Cell = tuple[str, str, str]


def rough(suite: Suite, workload: Workload, contestant: Contestant) -> float:
    """Seconds of one run of a cell on two ordinary cores, to a factor of two or three."""
    w = workload
    steps = 2 * w.sampled * -(-w.samples // 32)
    round = w.sampled * w.samples * _SAMPLE_S[w.family] + steps * _PARAMETER_S * _parameters(w)
    if contestant.program == "flower":
        round += w.sampled * _MESSAGE_S
    counted = suite.rounds * round if suite.rounds <= 3 else min(suite.rounds * round, max(BUDGET_S, 3 * round))
    return _START_S[contestant.program] + w.registered * _REGISTERED_S + suite.warmup * round + counted


def _parameters(workload: Workload) -> int:
    if workload.family == "cnn":
        return 118_026
    width, features = workload.width or 128, workload.features
    return 192 * width + 2 * width * features + 2 * features**2


class Forecast:
    """Seconds that are left, learned from what finished runs took.

    Args:
        cells: Every cell with a rough guess of one run's seconds.
        earlier: Records of this or an earlier benchmark that say what a run took.
    """

    def __init__(self, cells: Mapping[Cell, float], earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        self._rough = dict(cells)
        self._found: dict[Cell, list[float]] = {}
        self.learn(earlier)

    def learn(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take note of finished runs."""
        for r in records:
            if r.get("took"):
                self._found.setdefault((r["suite"], r["workload"], r["contestant"]), []).append(float(r["took"]))

    def seconds(self, cells: Iterable[Cell]) -> float:
        """Seconds that one run of each of these cells will take; unknown ones as the known ones turned out."""
        known = [c for c in self._found if c in self._rough]
        factor = 1.0
        if known:
            factor = sum(median(self._found[c]) for c in known) / sum(self._rough[c] for c in known)
        return sum(median(self._found[c]) if c in self._found else factor * self._rough[c] for c in cells)


def minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
