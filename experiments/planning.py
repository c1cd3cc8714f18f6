"""What a run will send, hold and take, found before it is paid for: `fedmm plan`.

Bytes are counted (`experiments/volumes.py`), memory is measured or computed from shapes. Time comes from a
rehearsal of the first rounds (`experiments/rehearsal.py`).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn

from clients.probe import Verdict, alike, first_samples
from clients.workspace import Workspace, workspace
from experiments.rehearsal import Seconds, seconds_of, simulated_seconds
from experiments.runner import absolute_root, check, choose_layout, data_laid_out, open_grid
from experiments.volumes import Volumes, in_buffer, volumes
from fedmm.config.schema import Config
from fedmm.data.federation import build_federation
from fedmm.engines.costs import MemoryNeed, training_memory
from fedmm.engines.grid import LocalGrid
from fedmm.errors import RunError
from fedmm.metrics.local import predict
from fedmm.models.blocks import block_of
from fedmm.types import SPLITS
from server.places import cohort_size
from server.plan import Plan, plan
from server.session import Session, Traffic

_TOGETHER = 512
"""Samples that pass through a model at a time when it is measured (`fedmm.metrics.local.predict`)."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds that trains clients.

    Attributes:
        base: Interpreter and libraries, measured in this process.
        data: All clients' samples; on one machine all processes share one copy.
        model: Weights of the model that it keeps.
        training: Weights, gradients, momenta and activations of a stack, or of one client.
        measuring: Activations of one pass over as many samples as are measured at a time.
        rehearsed: What this process came to hold in the rehearsal, server included; None: there was none here.
    """

    base: int
    data: int
    model: int
    training: int
    measuring: int
    rehearsed: int | None = None

    @property
    def total(self) -> int:
        """Bytes altogether; clients are trained and measured one after the other."""
        parts = self.base + self.data + self.model + max(self.training, self.measuring)
        return max(parts, self.rehearsed or 0)


@dataclass(frozen=True)
class Forecast:
    """What is known of a run beforehand."""

    config: Config
    parameters: dict[str, int]
    volumes: Volumes
    memory: Memory
    layout: Verdict
    seconds: Seconds

    def record(self) -> dict[str, Any]:
        """As plain values."""
        config, sent = self.config, self.volumes
        return {
            "method": config.method or "custom",
            "engine": config.engine.name,
            "rounds": config.train.rounds,
            "clients": config.scenario.clients,
            "clients_per_round": config.train.clients_per_round,
            "parameters": {"total": sum(self.parameters.values()), "blocks": self.parameters},
            "bytes": {
                "down": sum(sent.run.down.values()),
                "up": sum(sent.run.up.values()),
                "exact": sent.exact,
                "least": {"down": sent.least[0], "up": sent.least[1]},
                "most": {"down": sent.most[0], "up": sent.most[1]},
                "remarks": list(sent.words),
                "blocks": {"down": sent.run.down, "up": sent.run.up},
                "bootstrap": asdict(sent.bootstrap) if sent.bootstrap else None,
                "by_round": [asdict(traffic) for traffic in sent.rounds],
                "final": asdict(sent.final),
            },
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "layout": self.layout.record(),
            "seconds": asdict(self.seconds) | {"total": self.seconds.total},
        }


def forecast(config: Config, began: float | None = None) -> Forecast:
    """Count, measure and rehearse a run; nothing is left on disk.

    Args:
        config: What would be run.
        began: When the command was started (`perf_counter`).

    Raises:
        FedmmError: Whatever `run` would refuse before its first round.
    """
    began = perf_counter() if began is None else began
    config = absolute_root(config)
    check(config)
    base = _resident()
    prepared = plan(config)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = stack.enter_context(_scratch())
        # Flower's own runtime starts processes for each run: nothing of it is rehearsed.
        inside = config if config.engine.name != "flower" else _engine(config, "inproc")
        grid = stack.enter_context(open_grid(inside))
        stack.enter_context(data_laid_out(grid, prepared, folder))
        home = cast(LocalGrid, grid).home
        here = workspace(prepared.spec, None, home)
        cohort = cohort_size(config) if here.stack is not None else 1
        auto = config.engine.cohort == "auto"
        layout = choose_layout(prepared, home) if auto else Verdict(cohort, cohort, {}, "as set")
        session = Session(grid, prepared.spec, config.scenario.clients, lambda done, asked: None)
        session.connect(prepared.dataset.modalities)
        started = perf_counter() - began
        seconds = seconds_of(prepared, here, layout, grid, folder, started)
        memory = _memory(prepared, here, layout, base, seconds.rehearsed)
        closing = perf_counter()
    seconds = replace(seconds, final=seconds.final + perf_counter() - closing)
    federation = build_federation(prepared.dataset, config.scenario, config.seed)
    sent = volumes(prepared, federation)
    parameters: dict[str, int] = {}
    for name, tensor in prepared.model.state_dict().items():
        parameters[block_of(name)] = parameters.get(block_of(name), 0) + tensor.numel()
    if config.devices is not None:
        seconds = replace(seconds, devices=simulated_seconds(prepared, federation, sent))
    return Forecast(config, parameters, sent, memory, layout, seconds)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the rehearsal's files."""
    try:
        with TemporaryDirectory(prefix="fedmm-plan-") as folder:
            yield Path(folder)
    except OSError as error:
        raise RunError(
            f"the rehearsal cannot write here: {error.strerror or error}",
            where=gettempdir(),
            remedy="free space, or name another directory in TMPDIR",
        ) from error


def _engine(config: Config, name: str) -> Config:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"name": name})})


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(prepared: Plan, here: Workspace, layout: Verdict, base: int, rehearsed: bool) -> Memory:
    need: MemoryNeed = training_memory(
        here.model,
        prepared.dataset.specs,
        prepared.dataset.modalities,
        prepared.config.train.batch_size,
        momentum=prepared.config.train.momentum > 0,
    )
    pools = [here.pool(split) for split in SPLITS]
    tensors = [t for pool in pools for t in (*pool.x.values(), *pool.present.values(), pool.y)]
    data = sum(t.numel() * t.element_size() for t in tensors)
    whole = _resident() if rehearsed and prepared.config.engine.name == "inproc" else None
    return Memory(base, data, need.parameters, layout.cohort * need.total, _measuring(here), whole)


def _measuring(here: Workspace) -> int:
    """Input and output of the widest layer, for as many samples as a pass takes at a time."""
    widest = 0

    def look(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal widest
        held = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        widest = max(widest, sum(t.numel() * t.element_size() for t in held))

    pool = here.pool("train")
    data = first_samples(pool, alike(pool, 1), 1).client(0)
    hooks = [layer.register_forward_hook(look) for layer in here.model.modules() if not any(layer.children())]
    predict(here.model, data)
    for hook in hooks:
        hook.remove()
    most = max(int(here.pool(split).sizes.sum()) for split in SPLITS)
    return widest * min(_TOGETHER, most)


def _resident() -> int:
    """Bytes that this process holds at its peak so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- showing ----------------------------------------------------------------------------------------------------------


def tables(found: Forecast) -> list[Table]:
    """For the console: the run, bytes, memory, time."""
    return [_run_table(found), _bytes_table(found), _memory_table(found), _time_table(found)]


def _run_table(found: Forecast) -> Table:
    config, sent = found.config, found.volumes
    table = _table("run", "", "")
    table.add_row("rounds", str(config.train.rounds))
    if (size := in_buffer(config)) is not None:
        table.add_row("replies a version", f"{size} of {config.scenario.clients} clients")
    else:
        table.add_row("clients a round", f"{config.train.clients_per_round} of {config.scenario.clients}")
    table.add_row("parameters", f"{sum(found.parameters.values()):,}")
    table.add_row("layout", found.layout.line())
    for size, seconds in found.layout.seconds.items():
        how = f"in a stack of {size}" if size > 1 else "one by one"
        table.add_row("", f"{1000 * seconds:.3g} ms a step of a client, {how}")
    table.add_row("bytes", "exact" if sent.exact else "; ".join(sent.words))
    if not sent.exact:
        table.add_row("", f"down {sent.least[0]:,} to {sent.most[0]:,}, up {sent.least[1]:,} to {sent.most[1]:,}")
    return table


def _bytes_table(found: Forecast) -> Table:
    run, rounds = found.volumes.run, found.config.train.rounds
    regular = Traffic()
    for traffic in found.volumes.rounds:
        regular.add(regular.down, traffic.down)
        regular.add(regular.up, traffic.up)
    table = _table("bytes", "block", "parameters", "down a round", "up a round", "down, run", "up, run")

    def row(name: str, parameters: int | None, *sizes: int) -> None:
        table.add_row(name, "" if parameters is None else f"{parameters:,}", *(f"{size:,}" for size in sizes))

    def both(traffic: Traffic, block: str) -> tuple[int, int]:
        return traffic.down.get(block, 0), traffic.up.get(block, 0)

    for block in sorted(run.down.keys() | run.up.keys()):
        mean = (size // rounds for size in both(regular, block))
        row(block, found.parameters.get(block), *mean, *both(run, block))
    total = [sum(sizes.values()) for sizes in (regular.down, regular.up, run.down, run.up)]
    row("all", sum(found.parameters.values()), total[0] // rounds, total[1] // rounds, *total[2:])
    last = found.volumes.final
    table.add_row("at the end", "", "", "", f"{sum(last.down.values()):,}", f"{sum(last.up.values()):,}")
    return table


def _memory_table(found: Forecast) -> Table:
    memory = found.memory
    table = _table("memory of a process that trains", "", "MiB")
    named = {"libraries": memory.base, "samples (shared by all)": memory.data, "model": memory.model}
    named |= {"training": memory.training, "or measuring": memory.measuring}
    if memory.rehearsed is not None:
        named["rehearsal, with the server"] = memory.rehearsed
    for name, size in {**named, "at most": memory.total}.items():
        table.add_row(name, f"{size / 2**20:.1f}")
    return table


def _time_table(found: Forecast) -> Table:
    s = found.seconds
    how = "rehearsed" if s.rehearsed else "from timed steps"
    table = _table(f"time on engine {found.config.engine.name}, {how}", "", "seconds", "")
    flower = found.config.engine.name == "flower"
    table.add_row("start", f"{s.start:.1f}", "without Flower's processes" if flower else "libraries, data, processes")
    if s.bootstrap:
        table.add_row("bootstrap", f"{s.bootstrap:.1f}", "every client once")
    table.add_row("rounds", f"{s.rounds:.1f}", f"{s.round:.3f} each")
    table.add_row("validations", f"{s.evaluations:.1f}", f"{s.evaluation:.3f} each")
    if s.observations:
        table.add_row("observations", f"{s.observations:.1f}", f"{s.observation:.3f} each")
    table.add_row("end", f"{s.final:.1f}", "probes, validation, test, files")
    table.add_row("all", f"{s.total:.1f}", str(timedelta(seconds=round(s.total))), style="bold")
    if s.devices is not None:
        table.add_row("on the devices", f"{s.devices:.1f}", "simulated, training rounds without absences")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and len(columns) > 2 else "left")
    return table
