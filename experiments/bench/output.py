"""The benchmark's page: tables in bench.md and one SVG a suite, beside the files of its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from experiments.bench import start_up
from experiments.bench.goals import goal_table
from experiments.bench.plots import draw
from experiments.bench.results import Results
from experiments.bench.stopwatch import FEWEST
from experiments.bench.suites import BUDGET_S, Suite
from experiments.bench.tables import Table, equality_table, load_table, selection_table, tables
from experiments.bench.workloads import SIGMA
from fedmm.io.files import write_bytes

METHOD = f"""\
Every run is a process of its own; contestants take turns, and every cell is run once before any is run again. A value
is the median of the repeats (smallest-largest); a repeat's value is the median of its rounds after a warm-up. Ratios
are taken repeat by repeat, then their median. A round holds everything that the contestant does for it: selection,
messages, training, checks, aggregation, records on disk; evaluation and checkpoints are off everywhere. Sizes of
clients are log-normal (sigma {SIGMA}); 2 local epochs, batch 32, SGD with rate 0.05 and momentum 0.9. Same data,
clients, initial weights and order of batches for all. Flower runs the same server and client apps on its own simulation
with two actors of one CPU, ray has two workers; pfl runs in one process. A sample counts once, not once an epoch.
Where nothing else is said, inproc and ray choose by themselves, as `fedmm run` does, whether clients train as stacks.
Slow runs end after {FEWEST} counted rounds or more, once these have taken {BUDGET_S:.0f} s.
"""


def markdown(results: Results, every: Sequence[Table], pictures: Sequence[str]) -> str:
    """The report: machine, method, tables, pictures."""
    machine = results.machine
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"Measured {' and '.join(results.sittings)} on {machine['processor']}, {machine['cores']} cores "
        f"({machine['vectors']}), {machine['memory_gib']} GiB, accelerator: {machine['accelerator'] or 'none'}; "
        f"{machine['system']}; {versions}; commit {machine['commit'] or 'unknown'}, code {machine['code']}.",
        "",
        METHOD,
        *[f"* {note}" for note in results.notes],
        "",
    ]
    return "\n".join([*lines, *(t.markdown() for t in every), *(f"![{p}]({p})" for p in pictures), ""])


def show(console: Console, table: Table) -> None:
    """Print a table."""
    shown = RichTable(title=table.title, title_justify="left")
    for column in table.columns:
        shown.add_column(column, justify="left" if column in ("", table.columns[0]) else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def write(out: Path, results: Results, suites: Sequence[Suite]) -> list[Table]:
    """Write all files and return the tables.

    Args:
        out: Directory.
        results: What was measured.
        suites: Tables to make of it, those without a run left out.
    """
    results.save(out)
    every = [table] if (table := goal_table(results)) is not None else []
    every += [equality_table(results.checks)] if results.checks else []
    for suite in suites:
        every += tables(suite, results.runs)
    if results.selection:
        every.append(selection_table(results.selection))
    if results.start_up:
        columns = ("engine", "to the end of the first round, s", "processor, s", "split of the last start, s")
        every.append(Table("Start of a small run", columns, tuple(start_up.rows(results.start_up))))
    if results.runs:
        every.append(load_table(results.runs))
    pictures = [f"{s.name}.svg" for s in suites if draw(s, results.runs, out / f"{s.name}.svg")]
    write_bytes(out / "bench.md", markdown(results, every, pictures).encode())
    return every
