"""How long `fedmm run` takes until its first round is complete: `python -m experiments.bench.start_up`.

Each run is a real program in an empty directory. Wall time counts from its start to its first checkpoint, processor
time over all its processes; the split is what the program itself tells.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fedmm
from experiments.bench.figures import spread
from experiments.bench.stopwatch import processor_seconds
from fedmm.engines.processes import kill_tree
from fedmm.errors import RunError

ROOT = Path(fedmm.__file__).resolve().parents[1]
SMALL = [
    "data=synthetic",
    "data.samples=400",
    "scenario.clients=8",
    "train.clients_per_round=8",
    "train.local_epochs=1",
]
ENGINES = {"inproc": ["engine=inproc"], "ray": ["engine=ray", "engine.workers=2"]}
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Start:
    """One start of the program.

    Attributes:
        wall: Seconds to the end of the first round.
        processor: Processor seconds of all its processes until then.
        split: The program's own line.
    """

    wall: float
    processor: float
    split: str


def measure(engine: str) -> Start:
    """Start a small run and end it after its first round.

    Raises:
        RunError: It ended before, or did not get so far.
    """
    with tempfile.TemporaryDirectory(prefix="fedmm-start-") as room:
        out, log = Path(room) / "run", Path(room) / "log"
        command = [sys.executable, "-m", "experiments", "run", *SMALL, *ENGINES[engine], "train.rounds=100000"]
        began = time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--out", str(out)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            while not list((out / "checkpoints").glob("round-*[1-9].json")):
                if process.poll() is not None or time.perf_counter() - began > TIMEOUT_S:
                    raise RunError(f"no first round: {log.read_text(errors='replace')[-600:]}", where=engine)
                time.sleep(0.002)
            wall, processor = time.perf_counter() - began, processor_seconds(process.pid)
        finally:
            kill_tree(process.pid)
            process.wait()
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Start-up")]
        return Start(wall, processor, lines[0].partition(": ")[2] if lines else "")


def records(repeats: int = 5) -> list[dict[str, Any]]:
    """Every start: engine, repeat, seconds and processor seconds to the end of the first round, and the split."""
    return [
        {"engine": engine, "repeat": repeat} | asdict(measure(engine))
        for repeat in range(repeats)
        for engine in ENGINES
    ]


def rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """For a table: engine, seconds to the end of the first round, processor seconds, and the last start's split."""
    told: list[tuple[str, ...]] = []
    for engine in dict.fromkeys(str(r["engine"]) for r in found):
        starts = [r for r in found if r["engine"] == engine]
        wall, processor = (spread([r[key] for r in starts]).text() for key in ("wall", "processor"))
        told.append((engine, wall, processor, str(starts[-1]["split"])))
    return told


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each engine.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the start of a small run on each engine."""
    found = records(repeats)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("engine", "to the first round, s", "processor, s", "the last one's split, s", box=None)
    for row in rows(found):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    typer.run(main)
