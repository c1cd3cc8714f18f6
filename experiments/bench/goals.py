"""What the benchmark is meant to show, beside what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.bench.figures import Spread, spread
from experiments.bench.results import Record, Results
from experiments.bench.tables import Table, paired, values
from experiments.bench.workloads import HEADLINE, LARGE, METHODS

Finder = Callable[[Results], Spread | None]


@dataclass(frozen=True)
class Goal:
    """A figure with a bound.

    Attributes:
        text: What is measured.
        find: The figure; None if it was not measured.
        bound: To be reached.
        most: Whether smaller is better.
    """

    text: str
    find: Finder
    bound: float
    most: bool = False

    def row(self, results: Results) -> tuple[str, ...]:
        """Text, figure, goal, and whether the median reaches it."""
        found = self.find(results)
        goal = f"{'<=' if self.most else '>='} {self.bound:g}"
        if found is None:
            return self.text, "not measured", goal, "-"
        reached = found.median <= self.bound if self.most else found.median >= self.bound
        return self.text, found.text(), goal, "met" if reached else "missed"


def ratio(suite: str, workload: str, slow: str, fast: str) -> Finder:
    """How many times as long a round takes with one contestant as with another."""
    return lambda results: paired(_of(results, suite), (workload, slow), (workload, fast))


def outside(workload: str) -> Finder:
    """Percent of a round on inproc outside forward, backward and update."""

    def find(results: Results) -> Spread | None:
        shares = values(_of(results, "headline"), workload, "inproc", "training_share")
        return spread([100 * (1 - share) for share in shares]) if shares else None

    return find


def dearer(method: str) -> Finder:
    """Processor time of a method's round against FedAvg's on inproc, by the ratio of their parameters."""
    names = {w.method: w.name for w in METHODS}

    def find(results: Results) -> Spread | None:
        mine = _of(results, "methods")
        found = paired(mine, (names[method], "inproc"), (names["fedavg"], "inproc"), "processor")
        size = {r["workload"]: r["parameters"] for r in mine if not r["error"]}
        if found is None:
            return None
        more = size[names[method]] / size[names["fedavg"]]
        return Spread(found.median / more, found.low / more, found.high / more, found.n)

    return find


def growth(engine: str) -> Finder:
    """Memory of all processes, in kB, for each further registered client, its samples left out."""
    few, many = LARGE[0], LARGE[1]

    def find(results: Results) -> Spread | None:
        mine = _of(results, "large")
        memory = [values(mine, w.name, engine, "memory_mb") for w in (few, many)]
        more, own = many.registered - few.registered, many.samples * many.sample_bytes / 1e3
        found = [1e3 * (b - a) / more - own for a, b in zip(*memory, strict=False)]
        return spread(found) if found else None

    return find


def scaling(engine: str) -> Finder:
    """How many times as long a round of 1,000 of 10,000 clients takes as one of 100."""
    return lambda results: paired(_of(results, "large"), (LARGE[3].name, engine), (LARGE[1].name, engine))


def selecting(clients: int, method: str, key: str) -> Finder:
    """A figure of the submodular selection."""

    def find(results: Results) -> Spread | None:
        found = [r[key] for r in results.selection if (r["clients"], r["method"]) == (clients, method)]
        return spread(found) if found else None

    return find


def _of(results: Results, suite: str) -> list[Record]:
    return [r for r in results.runs if r["suite"] == suite]


def _headline() -> list[Goal]:
    small, large, images = (w.name for w in HEADLINE)
    wanted: list[tuple[str, str, str, float]] = [
        ("Flower", "ray", small, 25),
        ("Flower", "ray", large, 9),
        ("Flower", "ray", images, 4),
        ("pfl", "ray", small, 4),
        ("pfl", "ray", large, 3.5),
        ("bare loop", "ray", small, 3),
        ("bare loop", "ray", large, 3),
        ("bare loop", "ray", images, 2.2),
        ("bare loop", "inproc", small, 2),
        ("bare loop", "inproc", large, 2),
    ]
    ratios = [Goal(f"{slow} / {fast}, {w}", ratio("headline", w, slow, fast), bound) for slow, fast, w, bound in wanted]
    shares = zip((small, large, images), (15, 3, 1), strict=True)
    return ratios + [
        Goal(f"% of a round outside forward, backward, update, {w}", outside(w), b, most=True) for w, b in shares
    ]


GOALS: Sequence[Goal] = (
    *_headline(),
    *(
        Goal(f"Flower / ray, {w.name}", ratio("methods", w.name, "Flower", "ray"), 15)
        for w in METHODS
        if w.method != "fedavg"
    ),
    *(
        Goal(f"processor time of {m} / FedAvg's, by added parameters", dearer(m), 1.6, most=True)
        for m in ("fedcmi", "cmsfed")
    ),
    *(
        Goal(f"round of 1,000 / round of 100, of 10,000 clients, {e}", scaling(e), 10, most=True)
        for e in ("inproc", "ray")
    ),
    *(
        Goal(f"kB a registered client beyond its samples, all processes, {e}", growth(e), 50, most=True)
        for e in ("inproc", "ray")
    ),
    Goal("s, exact greedy, 1,000 of 10,000, distances known", selecting(10_000, "divfl", "seconds"), 2, most=True),
    Goal("s, CMSFed picks 1,000 of 100,000", selecting(100_000, "cmsfed", "seconds"), 20, most=True),
    Goal("MB, the same, whole process", selecting(100_000, "cmsfed", "memory_mb"), 2000, most=True),
)


def goal_table(results: Results) -> Table | None:
    """All goals of which one was measured."""
    rows = tuple(goal.row(results) for goal in GOALS)
    if all(row[-1] == "-" for row in rows):
        return None
    return Table("Goals", ("figure", "found", "goal", ""), rows)
