"""Which contestants meet on which workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.bench.launch import BARE, EVERYBODY, FLOWER, INPROC, INPROC_ALONE, INPROC_STACKED, PFL, RAY, Contestant
from experiments.bench.machine import cores
from experiments.bench.workloads import (
    METHODS,
    MLP_SMALL,
    REGISTERED,
    ROUNDS,
    SAMPLED,
    SAMPLES,
    SIZES,
    Workload,
)

MOST_WORKERS = 16


@dataclass(frozen=True)
class Suite:
    """A table of the benchmark.

    Attributes:
        name: For `--only` and file names.
        title: Heading.
        workloads: Its rows.
        contestants: Its columns.
        axis: Attribute of `Workload` that grows from row to row; "" if the rows have no order.
        warmup: Rounds that do not count.
        rounds: Rounds that do.
        repeats: Most runs of each cell; None: as the command line says.
        patterns: One of these must occur in a cell's path, if there are any.
    """

    name: str
    title: str
    workloads: tuple[Workload, ...]
    contestants: tuple[Contestant, ...]
    axis: str = ""
    warmup: int = 2
    rounds: int = 10
    repeats: int | None = None
    patterns: tuple[str, ...] = ()

    def cells(self) -> list[tuple[Workload, Contestant]]:
        """What is run in one repeat, in order: everybody on the first workload, then on the next."""
        return [
            (w, c)
            for w in self.workloads
            for c in self.contestants
            if (w.plain or c.program in ("ours", "flower"))
            and (not self.patterns or any(p in self.path(w, c) for p in self.patterns))
        ]

    def only(self, patterns: Sequence[str]) -> Suite:
        """What is left if one of the patterns must occur in "suite/workload/contestant"; all without patterns."""
        left = replace(self, patterns=tuple(patterns))
        kept = left.cells()
        return replace(
            left,
            workloads=tuple(w for w in self.workloads if any(w == one for one, _ in kept)),
            contestants=tuple(c for c in self.contestants if any(c == one for _, one in kept)),
        )

    def path(self, workload: Workload, contestant: Contestant) -> str:
        """Name of a cell."""
        return f"{self.name}/{workload.name}/{contestant.name}"


def workers() -> tuple[int, ...]:
    """1, 2, 4 ... up to the machine's cores."""
    return tuple(2**i for i in range(MOST_WORKERS.bit_length()) if 2**i <= min(cores(), MOST_WORKERS))


def suites(quick: bool) -> list[Suite]:
    """All tables, or the one that is over in a few minutes."""
    if quick:
        return [Suite("rounds", "A round", (MLP_SMALL,), (BARE, INPROC, RAY, FLOWER, PFL), warmup=1, rounds=5)]
    some = (BARE, INPROC, RAY, FLOWER, PFL)
    each = tuple(c.with_workers(n) for n in workers() for c in (RAY, FLOWER))
    many = next(w for w in ROUNDS if w.sampled == 100)
    return [
        Suite("rounds", "A round", ROUNDS, EVERYBODY),
        Suite("methods", "Methods", METHODS, (INPROC_ALONE, INPROC_STACKED, INPROC, RAY, FLOWER)),
        Suite("sampled", "Clients a round, of 1,000", SAMPLED, some, "sampled", warmup=1, rounds=3, repeats=3),
        Suite("registered", "Registered clients, 100 a round", REGISTERED, some, "registered", 1, 3, repeats=3),
        Suite("sizes", "Size of the model, 20 clients x 33", SIZES, some, "parameters", warmup=1, rounds=3, repeats=3),
        Suite("samples", "Samples a client, 20 clients", SAMPLES, some, "samples", warmup=1, rounds=5, repeats=3),
        Suite("workers", "Worker processes, 100 clients x 33", (many,), each, rounds=5, repeats=3),
    ]
