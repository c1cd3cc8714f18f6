"""Which contestants meet on which workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.bench.launch import (
    BARE,
    FLOWER,
    INPROC,
    INPROC_ALONE,
    INPROC_STACKED,
    PFL,
    RAY,
    RAY_ALONE,
    RAY_STACKED,
    Contestant,
)
from experiments.bench.machine import cores
from experiments.bench.workloads import HEADLINE, LARGE, METHODS, MLP_SMALL, SAMPLED, SAMPLES, SIZES, Workload

MOST_WORKERS = 16

FLOWER_SAMPLED = 100
"""Most clients a round with Flower, whose messages take some 10 ms each: more would say the same for minutes."""

BUDGET_S = 3.0
"""Seconds of counted rounds after which a slow contestant has shown enough."""


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
        rounds: Rounds that do, or fewer once they have taken `BUDGET_S`.
        repeats: Runs of each cell, unless the command line says otherwise.
        patterns: One of these must occur in a cell's path, if there are any.
    """

    name: str
    title: str
    workloads: tuple[Workload, ...]
    contestants: tuple[Contestant, ...]
    axis: str = ""
    warmup: int = 2
    rounds: int = 10
    repeats: int = 2
    patterns: tuple[str, ...] = ()

    def cells(self) -> list[tuple[Workload, Contestant]]:
        """What is run in one repeat, in order: everybody on the first workload, then on the next."""
        return [
            (w, c)
            for w in self.workloads
            for c in self.contestants
            if (w.plain or c.program in ("ours", "flower"))
            and (c.program != "flower" or w.sampled <= FLOWER_SAMPLED)
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
    """All tables, what matters most first; or the one that is over in a few minutes."""
    some = (BARE, INPROC, RAY, FLOWER, PFL)
    if quick:
        return [Suite("quick", "A round", (MLP_SMALL,), some, warmup=1, rounds=5)]
    layouts = (INPROC_ALONE, INPROC_STACKED, RAY_ALONE, RAY_STACKED)
    each = tuple(c.with_workers(n) for n in workers() for c in (RAY, FLOWER))
    many = HEADLINE[:1]
    return [
        Suite("headline", "A round", HEADLINE, some, warmup=1, rounds=8, repeats=5),
        Suite("methods", "Methods", METHODS, (INPROC, RAY, FLOWER), warmup=1, rounds=5, repeats=3),
        Suite("large", "Clients a round of registered ones", LARGE, (INPROC, RAY), warmup=1, rounds=3),
        Suite("layouts", "One by one and as stacks", HEADLINE, layouts, rounds=5),
        Suite("sampled", "Clients a round, of 1,000", SAMPLED, some, "sampled", warmup=1, rounds=3),
        Suite("sizes", "Size of the model, 20 clients x 33", SIZES, some, "parameters", warmup=1, rounds=3),
        Suite("samples", "Samples a client, 20 clients", SAMPLES, some, "samples", warmup=1, rounds=5),
        Suite("workers", "Worker processes, 100 clients x 33", many, each, rounds=5),
    ]
