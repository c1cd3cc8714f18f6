"""Command line of the benchmark: `python -m experiments.bench`."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from experiments.bench import gpu, machine, session
from experiments.bench.launch import pfl_interpreter
from experiments.bench.output import show, write
from experiments.bench.suites import suites

OUT = Path("experiments/results/bench")
PFL_VENV = Path(tempfile.gettempdir()) / "pfl_venv"
BUSY = 0.2
"""Cores busy with other work during a run's rounds above which the run is counted as disturbed."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="One workload, few rounds: a few minutes.")] = False,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each cell (5; quick: 2).")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Keep what has this in SUITE/WORKLOAD/CONTESTANT; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"Directory of the results ({OUT}; quick: runs/bench).")] = None,
    check: Annotated[bool, typer.Option(help="First check that all compute the same.")] = True,
    pfl_venv: Annotated[Path, typer.Option(help="Virtual environment with pfl; made if missing.")] = PFL_VENV,
    on_gpu: Annotated[bool, typer.Option("--gpu", help="Measure stacked clients on the GPU instead.")] = False,
) -> None:
    """Check that everybody computes the same, then time them: our engines, a bare loop, Flower's simulation, pfl."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    target = out or (Path("runs/bench") if quick else OUT)
    if on_gpu:
        raise typer.Exit(gpu.main(target, console))
    chosen = [s for suite in suites(quick) if (s := suite.only(only or [])).cells()]
    if not chosen:
        raise typer.BadParameter("nothing matches", param_hint="--only")
    notes: list[str] = []

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False)

    python: Path | None = None
    if any(c.program == "pfl" for s in chosen for c in s.contestants):
        python = pfl_interpreter(pfl_venv, say)
        if python is None:
            notes.append(f"pfl was left out: it could not be installed into {pfl_venv}.")
            chosen = [replace(s, contestants=tuple(c for c in s.contestants if c.program != "pfl")) for s in chosen]
            chosen = [s for s in chosen if s.cells()]
    about = machine.describe()
    records: list[dict[str, Any]] = []
    checks = session.check_equality(chosen, python, say) if check else []
    if not check:
        notes.append("Equality was not checked.")
    if wrong := [c for c in checks if not c.passed]:
        for table in write(target, about, notes, checks, chosen, []):
            show(console, table)
        console.print(f"{len(wrong)} of {len(checks)} checks failed, so nothing was timed.", style="red")
        raise typer.Exit(1)
    for suite in chosen:
        for record in session.measure(suite, repeats or (2 if quick else 5), python, say):
            records.append(record)
            if record["error"]:
                say(f"{record['contestant']}: {record['error']}")
        write(target, about, notes, checks, chosen, records)
    notes += _remarks(records)
    for table in write(target, about, notes, checks, chosen, records):
        show(console, table)
    console.print(f"Written to {target}")


def _remarks(records: list[dict[str, Any]]) -> list[str]:
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
