"""One run, on the engine that the configuration names, with progress, interruption and resumption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from clients.probe import Verdict, probe, read_verdict
from clients.workspace import workspace
from experiments import interrupts
from fedmm.config.schema import Config
from fedmm.data import build_federation
from fedmm.data.layout import lay_out
from fedmm.engines.grid import LocalGrid
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import ConfigError, Interrupted, RunError
from fedmm.io.files import write_json
from fedmm.io.run_directory import RunDirectory, check_place, read_summary
from fedmm.types import Tensors
from server.app import ROUND_MARK
from server.callbacks import Callback, RoundReport
from server.facts import Federates
from server.knowledge import KNOWLEDGE
from server.loop import Server
from server.places import cohort_size
from server.plan import Plan, check, plan

CLIENT_APP = "clients.app:app"
CREW = "clients.crew:work"
SERVER_APP = "server.app:app"

__all__ = ["CLIENT_APP", "CREW", "check", "run"]


class StartUp:
    """Where the time before the first round goes.

    Args:
        began: When the program began (`perf_counter`); None: this is not its only run, and nobody is told.

    Attributes:
        seconds: Stage -> seconds.
    """

    def __init__(self, began: float | None) -> None:
        self.seconds: dict[str, float] = {}
        self.told = began is not None
        self._mark = perf_counter() if began is None else began

    def reached(self, stage: str) -> None:
        """The time since the stage before belongs to this one."""
        now = perf_counter()
        self.seconds[stage] = round(now - self._mark, 3)
        self._mark = now

    def line(self) -> str:
        """All of it in one line."""
        parts = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return f"Start-up {sum(self.seconds.values()):.1f} s: {parts}"


class ProgressBar(Callback):
    """Shows start-up, rounds, replies of the current round and validation accuracy on a console."""

    def __init__(self, progress: Progress, label: str, start_up: StartUp) -> None:
        self._progress, self._label, self._start_up = progress, label, start_up
        self._task: TaskID = progress.add_task(label, total=None, note="connecting")

    def started(self, first_round: int, rounds: int) -> None:
        """See `Callback`."""
        self._start_up.reached("clients")
        if self._start_up.told:
            self._progress.console.print(self._start_up.line(), markup=False, highlight=False)
        self._progress.update(self._task, total=rounds, completed=max(first_round - 1, 0), note="first round")

    def replied(self, done: int, asked: int) -> None:
        """See `Callback`."""
        self._progress.update(self._task, note=f"{done}/{asked} replies")

    def finished_round(self, report: RoundReport) -> None:
        """See `Callback`."""
        note = f"val accuracy {report.validation['accuracy']:.3f}" if report.validation else ""
        self._progress.update(self._task, completed=report.round, note=note)
        if not self._progress.console.is_terminal and report.round % max(report.rounds // 10, 1) == 0:
            self._progress.console.print(f"{self._label}: round {report.round}/{report.rounds} {note}")


def ray_started() -> None:
    """Wait for Ray, which starts in the background.

    Raises:
        RunError: It does not start.
    """
    from fedmm.engines import ray_instance

    ray_instance.connect()


@contextmanager
def open_grid(config: Config) -> Iterator[Grid]:
    """The grid of engine inproc or ray; Ray's workers end with it unless another run of this process goes on."""
    clients = config.scenario.clients
    if config.engine.name == "inproc":
        yield InProcessGrid(CLIENT_APP, clients, crew=CREW)
        return
    from fedmm.engines.ray_workers import RayGrid, RayPool

    with RayPool(CLIENT_APP, config.engine.workers, CREW) as pool:
        yield RayGrid(pool, clients)


def run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    grid: Grid | None = None,
    label: dict[str, str] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Run one configuration into one directory and return its summary.

    Args:
        config: What to run.
        out: The run's directory.
        resume: Go on from the newest checkpoint; a finished run returns its summary at once.
        console: Where progress goes.
        grid: A grid to use instead of the configured engine's (a comparison keeps one over its runs).
        label: Label and setting of a comparison, for the manifest.
        began: When the program began (`perf_counter`); with it, the console tells where the start-up went.

    Raises:
        FedmmError: Bad configuration, missing data, a failed run, or (Interrupted) the user stopped it; the
            directory's summary.json says which, and `resume` goes on after the last checkpoint.
    """
    start_up = StartUp(began)
    start_up.reached("libraries")
    config = absolute_root(config)
    check(config)
    if grid is None and config.engine.name == "inproc" and any(fault.kind == "kill" for fault in config.faults):
        raise ConfigError("a planned kill would end this very process", where="faults", remedy="use engine=ray")
    if resume and (done := read_summary(out)) is not None:
        check_place(out, config, resume=True)
        return done
    console = console or Console(stderr=True, quiet=True)
    prepared = plan(config)
    if config.engine.name == "flower" and grid is None:
        return _run_flower(config, out, resume, console)
    # One thread, here and in the workers: sums over more threads round differently, and small models gain nothing.
    torch.set_num_threads(1)
    verdict = _known_verdict(out, config) if resume else None
    directory = RunDirectory(out, config, resume=resume, label=label)
    title = (label or {}).get("label") or config.method or config.objective.name
    with _progress(console) as progress, _recorded_failure(directory):
        bar = ProgressBar(progress, f"{title} seed {config.seed}", start_up)
        with nullcontext(grid) if grid is not None else open_grid(config) as here, data_laid_out(here, prepared, out):
            server = Server(prepared, here, directory, [bar])
            if server.session.crews is not None and config.engine.cohort == "auto":
                verdict = verdict or choose_layout(prepared, server.session.crews.home)
                server.session.crews.cohort = verdict.cohort
                directory.update_manifest({"layout": verdict.record()})
                console.print(verdict.line(), markup=False)
            start_up.reached("data and model")
            if config.engine.name == "ray":
                ray_started()
                start_up.reached("Ray")
            summary = server.run()
    summary |= label or {}
    directory.finish(summary)
    return summary


def choose_layout(prepared: Plan, home: str | None = None) -> Verdict:
    """Whether clients train as stacks, by a probe in this process.

    Args:
        prepared: The run.
        home: Folder where the samples have been laid out.
    """
    here = workspace(prepared.spec, None, home)
    pool = here.pool("train")
    federates = Federates(prepared.dataset.modalities, pool.owned, tuple(map(int, pool.sizes)))
    return probe(here, cohort_size(prepared.config), first_broadcast(prepared, federates))


def first_broadcast(prepared: Plan, federates: Federates) -> Tensors:
    """What clients get besides the model before the server has learned anything."""
    known = [KNOWLEDGE[kind](federates).broadcast() for kind in sorted(prepared.objective.knowledge())]
    state = prepared.strategy.begin(prepared.model.state_dict(), federates)
    return {n: t for tensors in known for n, t in tensors.items()} | prepared.strategy.broadcast(state)


def _known_verdict(out: Path, config: Config) -> Verdict | None:
    """The layout that an earlier session of this run chose, if it chose one of the same size."""
    try:
        return read_verdict(json.loads((out / "manifest.json").read_text())["layout"], cohort_size(config))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def data_laid_out(grid: Grid, prepared: Plan, out: Path) -> Iterator[None]:
    """Put the clients' samples where all processes of this machine can map them, once."""
    if not isinstance(grid, LocalGrid) or grid.crew is None:
        yield
        return
    folder = out / "data.part"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    config = prepared.config
    try:
        grid.home = lay_out(build_federation(prepared.dataset, config.scenario, config.seed), folder.resolve())
        yield
    finally:
        grid.home = None
        shutil.rmtree(folder, ignore_errors=True)


def absolute_root(config: Config) -> Config:
    """Workers do not share this process's working directory."""
    if config.data.root is None:
        return config
    data = config.data.model_copy(update={"root": str(Path(config.data.root).expanduser().resolve())})
    return config.model_copy(update={"data": data})


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    )


@contextmanager
def _recorded_failure(directory: RunDirectory) -> Iterator[None]:
    """Leave a summary behind that says how the run ended, if it did not end well; nothing, if it could not begin."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or interrupts.asked():
            _note(directory, "interrupted", "stopped by the user")
            raise Interrupted("interrupted", where=str(directory.path), remedy="go on with --resume") from None
        if isinstance(error, OSError):
            raise RunError(
                f"cannot write: {error.strerror or error}",
                where=str(directory.path),
                remedy="free space or choose another --out",
            ) from error
        if not (isinstance(error, ConfigError) and directory.withdraw()):
            _note(directory, "failed", str(error))
        raise


def _note(directory: RunDirectory, status: str, reason: str) -> None:
    config = directory.config
    write_json(
        directory.path / "summary.json",
        {"status": status, "reason": reason, "method": config.method or "custom", "seed": config.seed},
    )


def _run_flower(config: Config, out: Path, resume: bool, console: Console) -> dict[str, Any]:
    """Hand the run to Flower's own simulation; the server app writes the same directory."""
    from fedmm.engines.flower import run_flower

    directory = RunDirectory(out, config, resume=resume)
    out = out.resolve()
    run_config: dict[str, str | bool] = {"config": str(out / "config.yaml"), "out": str(out), "set": "", "resume": True}
    with _recorded_failure(directory):
        run_flower(
            SERVER_APP,
            CLIENT_APP,
            run_config,
            nodes=config.scenario.clients,
            workers=config.engine.workers,
            log=out / "flower.log",
            on_line=lambda line: console.print(line, markup=False) if ROUND_MARK in line else None,
        )
    summary = read_summary(out)
    if summary is None:
        raise RunError("Flower ended without a summary", where=str(out / "flower.log"), remedy="read this log")
    return summary
