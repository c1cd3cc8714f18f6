"""Command line of the benchmark: `python -m experiments.bench`."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from experiments.bench import gpu, selection, session, start_up
from experiments.bench.duration import CHECK_S, Forecast, minutes, rough
from experiments.bench.launch import Contestant, pfl_interpreter
from experiments.bench.output import show, write
from experiments.bench.results import Results, begin
from experiments.bench.suites import Suite, suites
from fedmm.errors import FedmmError, RunError

OUT = Path("experiments/results/bench")
PFL_VENV = Path(tempfile.gettempdir()) / "pfl_venv"
BUSY = 0.2
"""Cores busy with other work during a run's rounds above which the run is counted as disturbed."""

STOPPED = 130

EXTRAS: Mapping[str, tuple[float, Callable[[], list[dict[str, Any]]]]] = {
    "selection": (90.0, selection.records),
    "start_up": (80.0, start_up.records),
}
"""What is measured besides rounds: attribute of `Results` -> about how many seconds it takes, and how."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few rounds: a few minutes.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each cell (2 to 5, by suite).")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Keep what has this in SUITE/WORKLOAD/CONTESTANT, or in selection, start_up; may be repeated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"Directory of the results ({OUT}; quick: runs/bench).")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what is there, of this machine and code; go on.")] = False,
    check: Annotated[bool, typer.Option(help="First check that all compute the same.")] = True,
    pfl_venv: Annotated[Path, typer.Option(help="Virtual environment with pfl; made if missing.")] = PFL_VENV,
    on_gpu: Annotated[bool, typer.Option("--gpu", help="Measure stacked clients on the GPU instead.")] = False,
) -> None:
    """Check that everybody computes the same, then time them: our engines, a bare loop, Flower's simulation, pfl."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    target = out or (Path("runs/bench") if quick else OUT)
    if on_gpu:
        raise typer.Exit(gpu.main(target, console))
    every, wanted = suites(quick), only or []
    chosen = [s for suite in every if (s := suite.only(wanted)).cells()]
    extras = [name for name in EXTRAS if not quick and (not wanted or any(w in name for w in wanted))]
    if not chosen and not extras:
        raise typer.BadParameter("nothing matches", param_hint="--only")
    try:
        results = begin(target, add)
    except FedmmError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    signal.signal(signal.SIGTERM, _stop)
    sitting = _Sitting(results, target, console)
    try:
        good = sitting.run(chosen, extras, repeats, check, pfl_venv)
    except KeyboardInterrupt:
        good = False
        results.notes.append(f"Stopped after {sitting.done} of {sitting.total} runs.")
        console.print("Stopped; what was measured is kept, and the same command with --add goes on.", style="red")
        code = STOPPED
    else:
        code = 0 if good else 1
    results.notes += _remarks(results.runs)
    for table in write(target, results, every):
        show(console, table)
    console.print(f"Written to {target}")
    raise typer.Exit(code)


class _Sitting:
    """Measures what is not there yet, and writes after each step.

    Args:
        results: Added to.
        out: Where they are written.
        console: Told how far it is.
    """

    def __init__(self, results: Results, out: Path, console: Console) -> None:
        self._results, self._out, self._console = results, out, console
        self.done = self.total = 0

    def run(
        self, chosen: Sequence[Suite], extras: Sequence[str], repeats: int | None, check: bool, pfl_venv: Path
    ) -> bool:
        """Check and measure; False if somebody computes something else, so that nothing was timed."""
        results = self._results
        python: Path | None = None
        if any(c.program == "pfl" for s in chosen for c in s.contestants):
            python = pfl_interpreter(pfl_venv, self._say)
            if python is None:
                results.notes.append(f"pfl was left out: it could not be installed into {pfl_venv}.")
                chosen = [replace(s, contestants=tuple(c for c in s.contestants if c.program != "pfl")) for s in chosen]
                chosen = [s for s in chosen if s.cells()]
        todo = [t for t in session.turns(chosen, repeats) if not results.has(t)]
        extras = [name for name in extras if not getattr(results, name)]
        known = {c.what for c in results.checks if c.passed}
        checking = session.checking_runs(chosen, known) if check and todo else 0
        guesses = {
            k[:3]: rough(t.suite, t.workload, c) for t in todo for k, c in zip(t.keys, t.contestants, strict=True)
        }
        forecast = Forecast(guesses, results.runs)
        left = [key[:3] for turn in todo for key in turn.keys]
        self.total = len(left) + len(extras)
        later = sum(EXTRAS[name][0] for name in extras)
        expected = CHECK_S * checking + forecast.seconds(left) + later
        self._say(f"{checking} checks and {self.total} runs, about {minutes(expected)}")
        if checking:
            results.check(session.check_equality(chosen, python, self._say, known))
        elif not check:
            results.notes.append("Equality was not checked.")
        if wrong := [c for c in results.checks if not c.passed]:
            self._console.print(
                f"{len(wrong)} of {len(results.checks)} checks failed, so nothing was timed.", style="red"
            )
            return False
        for turn in todo:
            begun = iter(range(self.done, self.total))

            def starting(contestant: Contestant, turn: session.Turn = turn, begun: Iterator[int] = begun) -> None:
                at = next(begun)
                rest = minutes(forecast.seconds(left[at:]) + later)
                path = turn.suite.path(turn.workload, contestant)
                self._say(f"[{at + 1}/{self.total}, {rest} left] {path}, repeat {turn.repeat + 1}")

            records = session.measure(turn, python, starting)
            for record in records:
                if record["error"]:
                    self._say(f"{record['contestant']}: {record['error']}")
            forecast.learn(records)
            results.add(turn, records)
            results.save(self._out)
            self.done += len(records)
        for name in extras:
            self._say(f"[{self.done + 1}/{self.total}] {name}")
            try:
                setattr(results, name, EXTRAS[name][1]())
            except RunError as error:
                results.notes.append(f"{name} was not measured: {error}")
            results.save(self._out)
            self.done += 1
        return True

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)


def _stop(signal: int, frame: FrameType | None) -> None:
    """Whoever ends the program in an orderly way shall find what was measured."""
    raise KeyboardInterrupt


def _remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know to judge the numbers."""
    found = []
    disturbed = [r for r in records if (r.get("others") or 0.0) > BUSY]
    if disturbed:
        found.append(
            f"{len(disturbed)} of {len(records)} runs shared the machine with other work (more than {BUSY} cores)."
        )
    for contestant in dict.fromkeys(r["contestant"] for r in records if r["error"]):
        reasons = [r["error"] for r in records if r["contestant"] == contestant and r["error"]]
        found.append(f"{contestant}: {len(reasons)} runs do not count; the first: {reasons[0][:200]}")
    return found


if __name__ == "__main__":
    typer.run(main)
