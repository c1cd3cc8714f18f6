"""From records of runs to tables: medians with spread, and ratios between contestants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from experiments.bench.figures import Spread, number, ratios, spread
from experiments.bench.results import Record
from experiments.bench.session import Check
from experiments.bench.suites import Suite


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table under its title."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([f"## {self.title}", "", *lines, ""])


@dataclass(frozen=True)
class Figure:
    """A measured quantity: key of the record, heading, and factor to the unit in it."""

    key: str
    heading: str
    factor: float = 1.0


SECONDS = Figure("seconds", "ms a round", 1e3)
FIGURES = (
    SECONDS,
    Figure("us_per_sample", "us a sample"),
    Figure("processor_us_per_sample", "processor us a sample, all processes"),
    Figure("start_up", "seconds from the start of the process to the end of its first round"),
    Figure("memory_mb", "MB of all processes after the last round"),
)
OVERHEAD = Figure("training_share", "% of a round outside forward, backward and update")

REASON = 160

OTHERS = ("Flower", "pfl", "bare loop")
"""What our engines are compared with."""


def values(records: Sequence[Record], workload: str, contestant: str, key: str) -> list[float]:
    """A quantity of one cell, in order of repeats; failed runs and runs of something else are left out."""
    found = [r for r in records if (r["workload"], r["contestant"]) == (workload, contestant) and not r["error"]]
    return [r[key] for r in sorted(found, key=lambda r: int(r["repeat"])) if r.get(key) is not None]


def paired(
    records: Sequence[Record], slow: tuple[str, str], fast: tuple[str, str], key: str = "seconds"
) -> Spread | None:
    """Ratio of the time of a round of two cells (workload, contestant) over the repeats in which both succeeded."""
    one, other = (
        {
            r["repeat"]: r[key]
            for r in records
            if (r["workload"], r["contestant"]) == cell and not r["error"] and r.get(key)
        }
        for cell in (slow, fast)
    )
    both = sorted(set(one) & set(other))
    return ratios([one[i] for i in both], [other[i] for i in both]) if both else None


def measured(suite: Suite, records: Sequence[Record], figure: Figure) -> Table | None:
    """Contestants x workloads of one quantity; None if it was measured nowhere."""
    rows = []
    broken = {(r["workload"], r["contestant"]) for r in records if r["error"]} if figure is SECONDS else set()
    for contestant in suite.contestants:
        found = {w.name: values(records, w.name, contestant.name, figure.key) for w in suite.workloads}
        texts = [
            spread(_scaled(f, figure)).text() if f else "failed" if (name, contestant.name) in broken else "-"
            for name, f in found.items()
        ]
        if set(texts) != {"-"}:
            rows.append((contestant.name, *texts))
    if not rows:
        return None
    return Table(f"{suite.title}: {figure.heading}", ("", *(w.name for w in suite.workloads)), tuple(rows))


def _scaled(found: Sequence[float], figure: Figure) -> list[float]:
    return [100 * (1 - v) if figure is OVERHEAD else v * figure.factor for v in found]


def ratio_table(suite: Suite, records: Sequence[Record]) -> Table | None:
    """How many times as long a round takes with one contestant as with another."""
    names = {c.name for c in suite.contestants}
    rows = []
    for slow, fast in (p for p in _pairs(suite) if names >= set(p)):
        found = [paired(records, (w.name, slow), (w.name, fast)) for w in suite.workloads]
        if any(found):
            rows.append((f"{slow} / {fast}", *(s.text() if s else "-" for s in found)))
    if not rows:
        return None
    return Table(f"{suite.title}: times as long", ("", *(w.name for w in suite.workloads)), tuple(rows))


def _pairs(suite: Suite) -> list[tuple[str, str]]:
    """Others against ours, one by one against the engine's own choice, and Flower with equally many workers."""
    names = [c.name for c in suite.contestants]
    ours = [n for n in names if n.split(",")[0] in ("inproc", "ray")]
    alone = [(n, n.split(",")[0]) for n in ours if n.endswith("cohort off")]
    return [
        *((other, n) for other in OTHERS for n in ours),
        *alone,
        *(("Flower" + n[3:], n) for n in names if n.startswith("ray x")),
    ]


def layout_table(suite: Suite, records: Sequence[Record]) -> Table | None:
    """Clients that trained as one stack, where the run was free to choose."""
    rows = []
    for name in (c.name for c in suite.contestants if c.engine.get("cohort") == "auto"):
        found = [values(records, w.name, name, "cohort") for w in suite.workloads]
        if any(found):
            told = [sorted({int(v) for v in one}) for one in found]
            rows.append((name, *(" or ".join("one by one" if v == 1 else str(v) for v in t) or "-" for t in told)))
    if not rows:
        return None
    return Table(f"{suite.title}: clients in a stack, as chosen", ("", *(w.name for w in suite.workloads)), tuple(rows))


def method_table(suite: Suite, records: Sequence[Record]) -> Table | None:
    """What a method costs against FedAvg on the same clients, beside how many more parameters it has."""
    base = next((w for w in suite.workloads if w.method == "fedavg"), None)
    if suite.name != "methods" or base is None:
        return None
    size = {r["workload"]: r["parameters"] for r in records if not r["error"]}
    known = [{w.name, base.name} <= set(size) for w in suite.workloads]
    more = [number(size[w.name] / size[base.name]) if k else "-" for w, k in zip(suite.workloads, known, strict=True)]
    rows = [("parameters", *more)]
    for key, what in (("seconds", "time"), ("processor", "processor time")):
        for contestant in (c.name for c in suite.contestants):
            found = [paired(records, (w.name, contestant), (base.name, contestant), key) for w in suite.workloads]
            if any(found):
                rows.append((f"{what}, {contestant}", *(s.text() if s else "-" for s in found)))
    return Table("Methods: times FedAvg", ("", *(w.name for w in suite.workloads)), tuple(rows))


def load_table(records: Sequence[Record]) -> Table:
    """What else the machine had to do: other work on the same cores makes times longer."""
    rows = []
    for name in dict.fromkeys(str(r["suite"]) for r in records):
        mine = [r for r in records if r["suite"] == name and r.get("load") is not None]
        if mine:
            both = [spread([r[key] for r in mine]).text(digits=2) for key in ("load", "others")]
            rows.append((name, *both, str(len(mine))))
    columns = ("suite", "load average before a run", "cores busy with other work during its rounds", "runs")
    return Table("Other work on the machine", columns, tuple(rows))


def equality_table(checks: Sequence[Check]) -> Table:
    """The check that must hold before anything is timed."""
    rows = [
        (
            c.workload,
            c.contestant,
            c.reference,
            c.precision,
            f"... {c.reason[-REASON:]}" if c.reason else f"{c.distance:.1e}",
            f"{c.tolerance:.0e}",
            "equal" if c.passed else "DIFFERENT",
        )
        for c in checks
    ]
    columns = ("workload", "contestant", "against", "precision", "distance", "allowed", "")
    return Table("One round gives the same weights", columns, tuple(rows))


def selection_table(found: Sequence[Record]) -> Table:
    """Submodular selection: size, route, processor seconds of one core, peak memory of the process."""
    rows = [
        (f"{r['count']:,} of {r['clients']:,}", r["method"], r["route"], number(r["seconds"]), number(r["memory_mb"]))
        for r in found
    ]
    columns = ("clients", "method", "route", "processor s", "peak MB of the process")
    return Table("Submodular selection, one core", columns, tuple(rows))


def tables(suite: Suite, records: Sequence[Record]) -> list[Table]:
    """All tables of a suite, with the workloads that were measured."""
    mine = [r for r in records if r["suite"] == suite.name]
    if not mine:
        return []
    suite = replace(suite, workloads=tuple(w for w in suite.workloads if any(r["workload"] == w.name for r in mine)))
    makers: list[Callable[[], Table | None]] = [lambda f=f: measured(suite, mine, f) for f in FIGURES]  # type: ignore[misc]
    makers[1:1] = [lambda maker=maker: maker(suite, mine) for maker in (ratio_table, method_table, layout_table)]  # type: ignore[misc]
    makers.append(lambda: measured(suite, mine, OVERHEAD))
    return [table for make in makers if (table := make()) is not None]
