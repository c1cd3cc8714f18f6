"""Run the benchmark: first the check that everybody computes the same, then the measurements, in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.bench.figures import distance
from experiments.bench.launch import BARE, INPROC_ALONE, Contestant, Run, launch
from experiments.bench.suites import BUDGET_S, Suite
from experiments.bench.workloads import Precision, Workload
from fedmm.errors import RunError
from fedmm.types import Tensors

TOLERANCE: dict[Precision, float] = {"float32": 1e-5, "float64": 1e-12}
DRIFT = 1e-2
"""Relative distance after the first round above which a timed run, in float32, did something else. Where two values of
a pooling window differ by less than their rounding, the gradient goes to the other place: the bare loop and a stack are
1.4e-3 apart after a round of the convolutional network. Later rounds say nothing: differences of rounding grow. What is
exact is compared in float64."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One contestant's first round against the reference's."""

    workload: str
    contestant: str
    reference: str
    precision: Precision
    distance: float
    tolerance: float
    reason: str = ""

    @property
    def what(self) -> tuple[str, str, str]:
        """Workload, contestant and precision."""
        return self.workload, self.contestant, self.precision

    @property
    def passed(self) -> bool:
        """Whether the weights agree."""
        return not self.reason and self.distance <= self.tolerance


def reference(workload: Workload) -> Contestant:
    """Whom everybody must agree with: the bare loop, or, for methods that it cannot do, clients one by one."""
    return BARE if workload.plain else INPROC_ALONE


def check_equality(
    suites: Sequence[Suite], pfl_python: Path | None, say: Say, known: Collection[tuple[str, str, str]] = ()
) -> Iterator[Check]:
    """One round of every contestant on one workload of each kind of model and method, against the reference.

    In float64, but for pfl, which keeps differences of models in float32.

    Args:
        suites: Who will be timed, on what.
        pfl_python: Interpreter that has pfl.
        say: Told of each run.
        known: Checks (`Check.what`) that need not be made.
    """
    for workload, precision, guests in _rounds(suites, known):
        yield from _checks(workload, guests, precision, pfl_python, say)


def checking_runs(suites: Sequence[Suite], known: Collection[tuple[str, str, str]] = ()) -> int:
    """Runs that `check_equality` takes, the reference's included."""
    return sum(len(guests) + 1 for _, _, guests in _rounds(suites, known))


def _rounds(
    suites: Sequence[Suite], known: Collection[tuple[str, str, str]]
) -> Iterator[tuple[Workload, Precision, list[Contestant]]]:
    precisions: tuple[Precision, ...] = ("float64", "float32")
    for workload, contestants in _meetings(suites):
        for precision in precisions:
            able = [c for c in contestants if (c.program == "pfl") == (precision == "float32")]
            if guests := [c for c in able if (workload.name, c.name, precision) not in known]:
                yield workload, precision, guests


def _checks(
    workload: Workload, contestants: Sequence[Contestant], precision: Precision, pfl_python: Path | None, say: Say
) -> Iterator[Check]:
    judge = reference(workload)
    expected: Tensors | None = None
    for contestant in (judge, *contestants):
        say(f"equality: {workload.name}, {contestant.name}, {precision}")
        gap, reason = float("inf"), ""
        try:
            run = launch(contestant, workload, warmup=0, rounds=1, precision=precision, pfl_python=pfl_python)
            expected = run.weights if expected is None else expected
            gap = distance(run.weights, expected)
        except (RunError, ValueError) as error:
            reason = str(error)
        if contestant is not judge or reason:
            yield Check(workload.name, contestant.name, judge.name, precision, gap, TOLERANCE[precision], reason)
        if expected is None:
            return


def _meetings(suites: Sequence[Suite]) -> Iterator[tuple[Workload, list[Contestant]]]:
    """The first workload of each family and method, with everybody who will be timed on such a one."""
    first: dict[tuple[str, ...], Workload] = {}
    guests: dict[tuple[str, ...], dict[str, Contestant]] = {}
    for suite in suites:
        for workload, contestant in suite.cells():
            kind = (workload.family, workload.method, workload.norm)
            first.setdefault(kind, workload)
            guests.setdefault(kind, {})[contestant.name] = contestant
    for same, workload in first.items():
        judge = reference(workload).name
        yield workload, [c for c in guests[same].values() if c.name != judge]


@dataclass(frozen=True)
class Turn:
    """What is measured next to each other: one repeat of everybody on one workload.

    Attributes:
        suite: The table that it is for.
        workload: On what.
        repeat: Which repeat, from 0.
        contestants: Who; the first of them judges whether all computed the same.
    """

    suite: Suite
    workload: Workload
    repeat: int
    contestants: tuple[Contestant, ...]

    @property
    def keys(self) -> list[tuple[str, str, str, int]]:
        """Suite, workload, contestant and repeat of each run."""
        return [(self.suite.name, self.workload.name, c.name, self.repeat) for c in self.contestants]


def turns(suites: Sequence[Suite], repeats: int | None) -> list[Turn]:
    """All turns in order: in a suite every workload comes once before any a second time.

    Args:
        suites: What is measured.
        repeats: Runs of each cell; None: as each suite says.
    """
    return [
        Turn(suite, workload, repeat, tuple(c for w, c in suite.cells() if w == workload))
        for suite in suites
        for repeat in range(repeats or suite.repeats)
        for workload in suite.workloads
    ]


def measure(turn: Turn, pfl_python: Path | None, starting: Callable[[Contestant], None]) -> list[dict[str, Any]]:
    """Run everybody of a turn and return a record of each run.

    Contestants take turns in being first, so that none always profits from what the one before left.

    Args:
        turn: What.
        pfl_python: Interpreter that has pfl.
        starting: Called before each run.
    """
    suite, everyone = turn.suite, turn.contestants
    shift = turn.repeat % len(everyone)
    runs: dict[str, Run | str] = {}
    for contestant in [*everyone[shift:], *everyone[:shift]]:
        starting(contestant)
        try:
            runs[contestant.name] = launch(
                contestant,
                turn.workload,
                warmup=suite.warmup,
                rounds=suite.rounds,
                budget=BUDGET_S,
                pfl_python=pfl_python,
            )
        except RunError as error:
            runs[contestant.name] = str(error)
    return list(_records(suite, turn.workload, turn.repeat, everyone, runs))


def _records(
    suite: Suite, workload: Workload, repeat: int, cells: Sequence[Contestant], runs: dict[str, Run | str]
) -> Iterator[dict[str, Any]]:
    finished = {name: run for name, run in runs.items() if isinstance(run, Run)}
    judge = next((finished[c.name] for c in cells if c.name in finished), None)
    for contestant in cells:
        base = {"suite": suite.name, "workload": workload.name, "contestant": contestant.name, "repeat": repeat}
        run = runs[contestant.name]
        if isinstance(run, str) or judge is None:
            yield base | {"error": str(run)}
            continue
        drift = distance(run.weights, judge.weights)
        total, samples = sum(run.seconds), sum(run.samples)
        yield base | {
            "error": "" if drift <= DRIFT else f"its model is {drift:.1e} away from {cells[0].name}'s",
            "seconds": median(run.seconds),
            "rounds": run.seconds,
            "samples": samples / len(run.samples),
            "us_per_sample": 1e6 * total / samples,
            "processor": run.processor / len(run.seconds),
            "processor_us_per_sample": 1e6 * run.processor / samples,
            "training_share": run.training / total if run.training else None,
            "start_up": run.start_up,
            "memory_mb": run.memory / 1e6,
            "parameters": run.parameters,
            "load": run.load,
            "others": run.others,
            "drift": drift,
            "cohort": run.cohort,
            "took": run.took,
        }
