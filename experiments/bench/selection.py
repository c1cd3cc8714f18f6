"""Submodular selection at several sizes: seconds, memory and cost, as `python -m experiments.bench.selection`.

With `--json` only what the benchmark has a goal for, without the comparisons of cost.

Directions are synthetic: 200 clusters of unequal spread, 128 numbers for all encoders, 64 for the weak one. The cost
of picks is what the method minimises: the sum of everybody's distance to the nearest client picked to train all its
modalities, plus the same for the weak modality and those picked for it alone. "vs exact" compares with plain greedy
over exact sums (DivFL only: CMSFed's picks share out differently), "vs random" with random clients in the same
numbers. Seconds are processor time of one core, distances between rounds (up to 10,000 clients) made before; peak MB
is the whole process, its synthetic data included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from typing import Any, Literal, cast

import numpy as np
import torch

from experiments.bench.launch import ROOT, TIMEOUT_S
from fedmm.errors import RunError
from fedmm.seeding import numpy_rng
from server.directions import STORED, Directions
from server.knowledge import Federates, Imbalance
from server.selection import Pick, Situation
from server.selection.facility import Computed, greedy, total
from server.selection.submodular import CMSFed, DivFL, Field

MODALITIES = ("strong", "weak")
WIDTHS = {"joint": 128, "encoder.strong": 64, "encoder.weak": 64}
CLUSTERS = 200
JUDGES = 20_000
"""Most clients whose distance to the picks is summed when their cost is measured."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        clients: N.
        count: m.
        method: "divfl" or "cmsfed".
        route: "plain" and "stochastic": exact sums; "sampled"; "scaled": sampled in the proportions of 100,000
            clients (a tenth may be picked, a quarter is to be near).
    """

    clients: int
    count: int
    method: Literal["divfl", "cmsfed"]
    route: Literal["plain", "stochastic", "sampled", "scaled"]


CASES = (
    Case(2_000, 20, "divfl", "plain"),
    Case(2_000, 20, "divfl", "stochastic"),
    Case(2_000, 20, "divfl", "sampled"),
    Case(2_000, 20, "divfl", "scaled"),
    Case(2_000, 200, "divfl", "plain"),
    Case(2_000, 200, "divfl", "stochastic"),
    Case(2_000, 200, "divfl", "sampled"),
    Case(10_000, 100, "divfl", "scaled"),
    Case(10_000, 1_000, "divfl", "plain"),
    Case(10_000, 1_000, "divfl", "stochastic"),
    Case(10_000, 1_000, "divfl", "sampled"),
    Case(10_000, 1_000, "cmsfed", "stochastic"),
    Case(100_000, 100, "divfl", "sampled"),
    Case(100_000, 1_000, "divfl", "sampled"),
    Case(100_000, 1_000, "cmsfed", "sampled"),
)


GOALS = (
    Case(10_000, 1_000, "divfl", "plain"),
    Case(10_000, 1_000, "cmsfed", "stochastic"),
    Case(100_000, 1_000, "cmsfed", "sampled"),
)
"""What the benchmark measures."""


@dataclass(frozen=True)
class Line:
    """What a case took.

    Attributes:
        case: Which.
        seconds: Of one core; distances that are kept between rounds were there before.
        memory_mb: Peak of the whole process, synthetic data included.
        against_exact: Cost relative to plain greedy over exact sums.
        against_random: Cost relative to random clients.
    """

    case: Case
    seconds: float
    memory_mb: float
    against_exact: float | None = None
    against_random: float | None = None

    def text(self) -> str:
        """As a row of Markdown."""
        c = self.case
        cells = (f"{c.clients:,}", f"{c.count:,}", c.method, c.route, f"{self.seconds:.2f}", f"{self.memory_mb:.0f}")
        ratios = ("-" if v is None else f"{v:.4f}" for v in (self.against_exact, self.against_random))
        return "| " + " | ".join([*cells, *ratios]) + " |"


def situation(clients: int) -> Situation:
    """A federation whose server has heard of everybody once."""
    rng = numpy_rng(0, "bench selection", clients)
    federates = Federates(MODALITIES, (MODALITIES,) * clients, (10,) * clients)
    directions, imbalance = Directions(federates), Imbalance(federates)
    cluster = rng.integers(0, CLUSTERS, clients)
    spread = rng.lognormal(-0.3, 0.5, (clients, 1)).astype(np.float32)
    for key, width in WIDTHS.items():
        rows = rng.standard_normal((CLUSTERS, width), dtype=np.float32)[cluster]
        rows += spread * rng.standard_normal((clients, width), dtype=np.float32)
        directions.learn_rows(key, range(clients), torch.from_numpy(rows))
    accuracy = np.column_stack([np.full(clients, 0.9), 0.9 / rng.uniform(1, 2.5, clients)])
    imbalance.tensors = {"accuracy": torch.from_numpy(accuracy)}
    return Situation(
        1, tuple(range(clients)), federates, {"directions": directions, "imbalance": imbalance}, lambda ks: {}
    )


def pick(case: Case, seen: Situation, known: Directions) -> list[Pick]:
    """The case's picks."""
    rng = numpy_rng(0, "selection", 1)
    if case.route == "scaled":
        sites, demand = (np.sort(rng.choice(case.clients, case.clients // n, replace=False)) for n in (10, 4))
        cover = Field(sites, np.arange(len(sites)), demand, seed=1).cover(known, "joint", False)
        return [seen.everything(int(sites[i])) for i in greedy(cover, range(len(sites)), case.count)]
    kind: Literal["plain", "stochastic"] = "plain" if case.route == "plain" else "stochastic"
    route: Literal["sampled", "exact"] = "sampled" if case.route == "sampled" else "exact"
    if case.method == "divfl":
        return DivFL(vectors="encoders", greedy=kind, route=route).select(seen, case.count, rng)
    return CMSFed(greedy=kind, route=route).select(seen, case.count, rng)


def cost(known: Directions, picks: Sequence[Pick]) -> float:
    """What the method minimises, over at most `JUDGES` random clients."""
    clients = len(known.federates.owned)
    judges = numpy_rng(0, "bench judges").choice(clients, min(clients, JUDGES), replace=False)
    everything = [p.client for p in picks if len(p.modalities) > 1]
    weak = [p.client for p in picks if len(p.modalities) == 1]
    parts = ((known.vectors("joint").numpy(), everything), (known.vectors("encoder.weak").numpy(), weak))
    return sum(total(Computed(v[chosen], v[judges]), range(len(chosen))) for v, chosen in parts if chosen)


def at_random(known: Directions, picks: Sequence[Pick]) -> float:
    """Mean cost of random clients in the place of the picked ones."""
    clients, costs = len(known.federates.owned), []
    for draw in range(5):
        others = numpy_rng(0, "bench random", draw).choice(clients, len(picks), replace=False)
        costs.append(cost(known, [Pick(int(k), p.modalities) for k, p in zip(others, picks, strict=True)]))
    return float(np.mean(costs))


def measure(case: Case, costs: bool = True) -> Line:
    """The case's line; to be run in a process of its own.

    Args:
        case: Which.
        costs: Whether to compare the picks' cost with that of others.
    """
    torch.set_num_threads(1)
    seen = situation(case.clients)
    known = cast(Directions, seen.knowledge["directions"])
    if case.route in ("plain", "stochastic"):
        for key in ("joint", "encoder.weak") if case.method == "cmsfed" else ("joint",):
            known.distances(key)
    began = time.process_time()
    picks = pick(case, seen, known)
    seconds = time.process_time() - began
    line = Line(case, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
    if not costs:
        return line
    mine, exact = cost(known, picks), None
    if case.method == "divfl" and case.clients <= STORED:
        exact = mine / cost(known, pick(replace(case, route="plain"), seen, known))
    return replace(line, against_exact=exact, against_random=mine / at_random(known, picks))


def records() -> list[dict[str, Any]]:
    """What the benchmark has a goal for, measured in processes of its own.

    Raises:
        RunError: It failed.
    """
    command = [sys.executable, "-m", "experiments.bench.selection", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RunError(f"ended with code {done.returncode}: {' '.join(done.stderr.split())[-600:]}", where="selection")
    return [dict(json.loads(line)) for line in done.stdout.splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table line by line."""
    parser = argparse.ArgumentParser(description="Submodular selection at several sizes.")
    parser.add_argument("--clients", type=int, help="only lines with this number of clients")
    parser.add_argument("--json", action="store_true", help="what the benchmark has a goal for, as JSON lines")
    options = parser.parse_args(arguments)
    # Read by the linear algebra of the processes below when they start: one core.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if not options.json:
        print("| N | m | method | route | seconds | peak MB | vs exact | vs random |")
        print("| --- " * 8 + "|")
    for case in GOALS if options.json else CASES:
        if options.clients in (None, case.clients):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                line = pool.submit(measure, case, costs=not options.json).result()
            flat = asdict(case) | {"seconds": line.seconds, "memory_mb": line.memory_mb}
            print(json.dumps(flat) if options.json else line.text(), flush=True)


if __name__ == "__main__":
    main()
