"""On a GPU: clients trained as one stack against clients one by one. `python -m experiments.bench --gpu`.

Three kinds of model: the small dense one, the small convolutional one, and a pair of ResNet-18. For each, the time of
a round (all clients, all steps, data already on the card) against the number of clients, the memory that the stack
takes, and from its growth how many clients would fit; then one step of a stack as it is, compiled, and replayed as a
CUDA graph (`experiments/bench/gpu_step.py`). Whatever fails is written down, and the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from clients.cohort import Member, train_stack
from clients.trainer import LocalSchedule, batches
from experiments.bench import machine
from experiments.bench.figures import distance, number, spread
from experiments.bench.gpu_step import FORMS, StackStep
from experiments.bench.output import show
from experiments.bench.tables import Table
from experiments.bench.workloads import CLASSES
from fedmm.config.schema import ModelConfig, Plugin
from fedmm.data.federation import Pool
from fedmm.io.files import write_bytes, write_json
from fedmm.models import MultimodalModel, build_model
from fedmm.models.stacked import Stack
from fedmm.objectives import build_objective
from fedmm.seeding import torch_rng
from fedmm.types import Kind, ModalitySpec, Tensors

DENSE, SMALL, PAIR = "dense", "convolutional", "ResNet-18 pair"

STEPS = 20

TOLERANCE = 1e-9
"""Relative distance of a client's model after a round, in float64: in float32 a value beside zero may be stopped by one
ReLU and pass the other, and a deep network makes thousandths of that."""


@dataclass(frozen=True)
class Case:
    """One kind of model.

    Attributes:
        name: How tables call it.
        model: The network.
        shapes: Modality -> kind and shape.
        samples: Training samples of each client.
        counts: Numbers of clients, ascending.
        alone: Most clients that are also trained one by one; the time of more grows in proportion.
    """

    name: str
    model: ModelConfig
    shapes: dict[str, tuple[Kind, tuple[int, ...]]]
    samples: int
    counts: tuple[int, ...]
    alone: int = 100


_IMAGES: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "first": ("image", (1, 28, 28)),
    "second": ("spectrogram", (1, 20, 44)),
}
CASES = (
    Case(
        DENSE,
        ModelConfig(encoder="mlp", norm="none", fusion="mlp"),
        {"first": ("vector", (64,)), "second": ("vector", (128,))},
        64,
        (10, 20, 50, 100, 200, 500, 1000, 2000),
    ),
    Case(
        SMALL,
        ModelConfig(encoder="convnet", norm="none", fusion="mlp"),
        _IMAGES,
        64,
        (10, 20, 50, 100, 200, 500, 1000),
    ),
    Case(
        PAIR,
        ModelConfig(encoder="resnet18", norm="group", fusion="mlp", features=512),
        {"first": ("image", (3, 32, 32)), "second": ("spectrogram", (1, 32, 32))},
        64,
        (1, 2, 5, 10, 20, 50, 100),
        10,
    ),
)
SCHEDULE = LocalSchedule(epochs=2, batch_size=32, lr=0.01, momentum=0.9, weight_decay=0.0)
OBJECTIVE = build_objective(Plugin(name="joint"))


class Bench:
    """One case on one device.

    Args:
        case: What.
        device: Where.
        clients: For how many clients to make data.
        dtype: In which format.
    """

    def __init__(self, case: Case, device: torch.device, clients: int, dtype: torch.dtype = torch.float32) -> None:
        specs = {m: ModalitySpec(kind, shape) for m, (kind, shape) in case.shapes.items()}
        self.device = device
        self.model: MultimodalModel = build_model(specs, CLASSES, case.model, 0).to(device, dtype)
        self.received: Tensors = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        self.stack = Stack(self.model)
        self.pool = _pool(case, clients).to(device, dtype)

    def stacked(self, clients: int) -> Tensors:
        """Train the first clients as one stack; tensors [K, ...] in the plain layout."""
        result = train_stack(
            self.stack,
            self.received,
            OBJECTIVE,
            self.pool,
            [Member(k, SCHEDULE) for k in range(clients)],
            list(self.pool.x),
            {"round": torch.zeros((), dtype=torch.int64, device=self.device)},
            0,
            1,
        )
        # The twin holds on to the last tensors that were bound to it.
        self.stack.bind(self.stack.expand_all(self.received, 1))
        return {n: self.stack.plain(n, t) for n, t in result.model.items()}

    def alone(self, clients: int) -> Tensors:
        """Train the first clients one after another, one module reset in place; the last one's tensors."""
        parameters = [p.detach() for p in self.model.parameters()]
        start = [self.received[n] for n, _ in self.model.named_parameters()]
        for k in range(clients):
            torch._foreach_copy_(parameters, start)
            optimiser = torch.optim.SGD(self.model.parameters(), SCHEDULE.lr, SCHEDULE.momentum, foreach=True)
            for _, batch in batches(OBJECTIVE, self.pool.client(k), {}, SCHEDULE, 0, 1, k):
                optimiser.zero_grad()
                (loss,) = OBJECTIVE.losses(self.model, batch, {})
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        return {n: t.detach().clone() for n, t in self.model.state_dict().items()}


def _pool(case: Case, clients: int) -> Pool:
    generator = torch_rng(0, f"bench/gpu/{case.name}")
    n = clients * case.samples
    sizes = np.full(clients, case.samples, dtype=np.int64)
    modalities = tuple(case.shapes)
    return Pool(
        {m: torch.randn(n, *shape, generator=generator) for m, (_, shape) in case.shapes.items()},
        {m: torch.ones(n, dtype=torch.bool) for m in modalities},
        torch.randint(CLASSES, (n,), generator=generator),
        np.cumsum(sizes) - sizes,
        sizes,
        CLASSES,
        frozenset(modalities),
        (modalities,) * clients,
    )


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each repetition, after one that does not count; waits for the device."""
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """A record for each number of clients, up to the one that no longer fits.

    Raises:
        ValueError: The stack gives another model than training alone.
    """
    gap = _gap(Bench(case, device, 2, torch.float64), 2)
    if gap > TOLERANCE:
        raise ValueError(f"{case.name}: a client of a stack is {gap:.1e} away from the same client alone")
    bench = Bench(case, device, max(case.counts))
    records: list[dict[str, Any]] = []
    for count in case.counts:
        try:
            records.append(_record(bench, case, count, repeats) | {"distance": gap})
        except torch.OutOfMemoryError:
            records.append({"case": case.name, "clients": count, "error": "out of memory"})
            break
    return records


def _gap(bench: Bench, clients: int) -> float:
    """How far the last of some clients lies from the same client alone."""
    own, stack = bench.alone(clients), bench.stacked(clients)
    return distance({n: t[clients - 1] for n, t in stack.items()}, own)


def _record(bench: Bench, case: Case, count: int, repeats: int) -> dict[str, Any]:
    cuda = bench.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
    seconds = timed(lambda: bench.stacked(count), bench.device, repeats)
    memory = torch.cuda.max_memory_allocated(bench.device) - before if cuda else 0
    record = {"case": case.name, "clients": count, "error": "", "stacked": seconds, "memory": memory}
    if count <= case.alone:
        record["alone"] = timed(lambda: bench.alone(count), bench.device, repeats)
    return record


def room(records: Sequence[dict[str, Any]], total: int) -> int | None:
    """Clients that would fit into `total` bytes, by a straight line through the two largest stacks."""
    known = [(r["clients"], r["memory"]) for r in records if not r["error"] and r["memory"]]
    if len(known) < 2 or known[-1][1] <= known[-2][1]:
        return None
    (k0, m0), (k1, m1) = known[-2:]
    slope = (m1 - m0) / (k1 - k0)
    return int(k1 + (total - m1) / slope)


def table(case: Case, records: Sequence[dict[str, Any]], total: int) -> Table:
    """Time, speed-up and memory against the number of clients."""
    rows = []
    for r in records:
        if r["error"]:
            rows.append((str(r["clients"]), r["error"], "-", "-", "-"))
            continue
        stacked = spread(r["stacked"])
        alone = spread(r["alone"]) if "alone" in r else None
        rows.append(
            (
                str(r["clients"]),
                spread([1e3 * s for s in r["stacked"]]).text(),
                spread([1e3 * s for s in r["alone"]]).text() if alone else "-",
                f"{number(alone.median / stacked.median)}x" if alone else "-",
                number(r["memory"] / 2**20),
            )
        )
    fit = room(records, total)
    title = f"{case.name}: {'about ' + format(fit, ',') + ' clients fit' if fit else 'memory not extrapolated'}"
    return Table(title, ("clients", "stacked, ms a round", "one by one, ms", "times faster", "MiB"), tuple(rows))


def main(
    out: Path,
    console: Console,
    cases: Sequence[Case] = CASES,
    repeats: int = 5,
    device: torch.device | None = None,
) -> int:
    """Measure all cases and write gpu.json and gpu.md after each; the exit code.

    Args:
        out: Directory of the results.
        console: For the tables.
        cases: What to measure.
        repeats: Of each number of clients.
        device: Where; None: the GPU, if there is one.
    """
    if device is None:
        if not torch.cuda.is_available():
            console.print("There is no GPU here, so nothing was measured.")
            return 0
        device = torch.device("cuda", torch.cuda.current_device())
    # Both sides in full float32, as on a processor.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    about = machine.describe()
    runs: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    failures: list[str] = []
    for case in cases:
        console.print(f"{case.name}: up to {max(case.counts):,} clients", style="dim", highlight=False)
        # An unattended run shall bring home what can be had.
        try:
            runs += (mine := measure(case, device, repeats))
            show(console, table(case, mine, total))
            steps += step_seconds(case, device, repeats)
        except (RuntimeError, ValueError) as error:
            failures.append(f"{case.name}: {error}")
            console.print(failures[-1], style="red", markup=False)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        found = {"machine": about, "total_memory": total, "runs": runs, "steps": steps, "failures": failures}
        _write(out, found, cases)
    for made in (goal_table(runs), step_table(steps)):
        show(console, made)
    console.print(f"Written to {out}")
    return 1 if failures else 0


def step_seconds(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Seconds of one step of a stack of `case.alone` clients at most, in several forms; what fails says so."""
    count = max(k for k in case.counts if k <= case.alone)
    bench = Bench(case, device, count)
    records = []
    for form, prepare in FORMS.items():
        record: dict[str, Any] = {"case": case.name, "clients": count, "form": form, "error": ""}
        try:
            step = prepare(StackStep(bench.stack, bench.received, OBJECTIVE, bench.pool, count, SCHEDULE))
            seconds = timed(lambda step=step: [step() for _ in range(STEPS)], device, repeats)  # type: ignore[misc]
            record["seconds"] = [s / STEPS for s in seconds]
        except Exception as error:  # compilers fail in many ways, none of which concerns the rest
            record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        records.append(record)
    torch.compiler.reset()  # what was compiled holds on to its tensors
    return records


def _ratio(runs: Sequence[dict[str, Any]], case: str, clients: int, key: str, other: tuple[int, str]) -> float | None:
    """Median time of one number of clients and way against another's, of one case."""
    found = {r["clients"]: r for r in runs if r["case"] == case and not r["error"]}
    sides = [found.get(k, {}).get(way) for k, way in ((clients, key), other)]
    return spread(sides[0]).median / spread(sides[1]).median if sides[0] and sides[1] else None


def goal_table(runs: Sequence[dict[str, Any]]) -> Table:
    """What a GPU is meant to show, beside what it showed."""
    pair = [r["clients"] for r in runs if r["case"] == PAIR and r.get("alone")]
    worst = [v for k in pair if (v := _ratio(runs, PAIR, k, "stacked", (k, "alone"))) is not None]
    goals = [
        ("100 dense clients: one by one / stacked", _ratio(runs, DENSE, 100, "alone", (100, "stacked")), 20.0, False),
        ("100 small CNNs: one by one / stacked", _ratio(runs, SMALL, 100, "alone", (100, "stacked")), 5.0, False),
        ("ResNet-18 pairs: stacked / one by one, worst", max(worst, default=None), 1.1, True),
        ("200 dense clients / 10, stacked", _ratio(runs, DENSE, 200, "stacked", (10, "stacked")), 1.5, True),
    ]
    rows = []
    for text, value, bound, most in goals:
        reached = value is not None and (value <= bound if most else value >= bound)
        verdict = "-" if value is None else "met" if reached else "missed"
        shown = "not measured" if value is None else number(value)
        rows.append((text, shown, f"{'<=' if most else '>='} {bound:g}", verdict))
    return Table("Goals", ("times as long", "found", "goal", ""), tuple(rows))


def step_table(steps: Sequence[dict[str, Any]]) -> Table:
    """One step of a stack in several forms."""
    rows = [
        (r["case"], str(r["clients"]), r["form"], r["error"] or spread([1e3 * s for s in r["seconds"]]).text())
        for r in steps
    ]
    return Table("One step of a stack", ("model", "clients", "form", "ms"), tuple(rows))


def _write(out: Path, found: dict[str, Any], cases: Sequence[Case]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "gpu.json", found)
    about, runs = found["machine"], found["runs"]
    lines = [
        f"# Stacked clients on {about['accelerator'] or about['processor']}",
        "",
        f"Measured {about['measured']}, torch {torch.__version__}, commit {about['commit'] or 'unknown'}. A value is",
        "the median (smallest-largest). A round: 2 local epochs of 64 samples a client in batches of 32, drawn in it,",
        "samples on the card, float32 without TF32; before it, a stack of two has been found to give the same model as",
        "one by one in float64. One step: forward, backward and update on fixed batches.",
        "",
        *[f"* {failure}" for failure in found["failures"]],
        "",
    ]
    every = [goal_table(runs)]
    every += [
        table(c, mine, found["total_memory"]) for c in cases if (mine := [r for r in runs if r["case"] == c.name])
    ]
    every.append(step_table(found["steps"]))
    write_bytes(out / "gpu.md", "\n".join([*lines, *(t.markdown() for t in every)]).encode())
