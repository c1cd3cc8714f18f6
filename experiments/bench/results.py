"""All that a benchmark has measured, kept on disk while it grows, and added to by a later sitting."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.bench import machine as machines
from experiments.bench.session import Check, Turn
from fedmm.errors import ConfigError
from fedmm.io.files import write_bytes, write_json

Record = dict[str, Any]

COLUMNS = (
    "suite",
    "workload",
    "contestant",
    "repeat",
    "seconds",
    "samples",
    "us_per_sample",
    "processor",
    "processor_us_per_sample",
    "training_share",
    "start_up",
    "memory_mb",
    "parameters",
    "cohort",
    "load",
    "others",
    "drift",
    "took",
    "error",
)


@dataclass
class Results:
    """What was measured, and on what.

    Attributes:
        machine: See `machines.describe`.
        sittings: When each sitting began.
        notes: What a reader must know.
        checks: That all compute the same.
        runs: A record of each run.
        selection: Of the submodular selection at several sizes.
        start_up: Of starts of `fedmm run`.
    """

    machine: dict[str, Any]
    sittings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)
    selection: list[Record] = field(default_factory=list)
    start_up: list[Record] = field(default_factory=list)

    def has(self, turn: Turn) -> bool:
        """Whether all runs of a turn are there and count."""
        good = {(r["suite"], r["workload"], r["contestant"], r["repeat"]) for r in self.runs if not r["error"]}
        return good >= set(turn.keys)

    def add(self, turn: Turn, records: Sequence[Record]) -> None:
        """Take the records of a turn in the place of earlier ones."""
        old = set(turn.keys)
        self.runs = [r for r in self.runs if (r["suite"], r["workload"], r["contestant"], r["repeat"]) not in old]
        self.runs += records

    def check(self, checks: Iterable[Check]) -> None:
        """Take checks one after the other, each in the place of an earlier one of the same."""
        for check in checks:
            self.checks = [c for c in self.checks if c.what != check.what] + [check]

    def save(self, out: Path) -> None:
        """Write bench.json (everything) and runs.csv (one line a run)."""
        out.mkdir(parents=True, exist_ok=True)
        body = vars(self) | {"equality": [asdict(c) for c in self.checks]}
        write_json(out / "bench.json", {name: value for name, value in body.items() if name != "checks"})
        write_bytes(out / "runs.csv", csv_text(self.runs).encode())


def begin(out: Path, add: bool) -> Results:
    """Empty results of this machine and code, or those in `out` to be added to.

    Raises:
        ConfigError: What is in `out` cannot be read, or was measured on another machine, or with other code.
    """
    now = machines.describe()
    if not add or not (out / "bench.json").exists():
        return Results(now, [now["measured"]])
    try:
        found = json.loads((out / "bench.json").read_text(encoding="utf-8"))
        checks = [Check(**c) for c in found.pop("equality")]
        results = Results(**found, checks=checks)
        unlike = [k for k in machines.SAME if results.machine.get(k) != now[k]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"cannot be added to: {error!r}", where=str(out), remedy="measure without --add") from error
    if unlike:
        differences = "; ".join(f"{k}: {results.machine.get(k)} there, {now[k]} here" for k in unlike)
        raise ConfigError(
            f"was measured under other conditions ({differences})",
            where=str(out),
            remedy="measure everything anew without --add, or into another --out",
        )
    results.sittings.append(now["measured"])
    results.notes = []
    return results


def csv_text(records: Sequence[Record]) -> str:
    """Runs as CSV with the columns of `COLUMNS`; what was not measured stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
