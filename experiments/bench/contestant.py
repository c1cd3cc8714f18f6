"""One run of one contestant, in a process of its own: `python -m experiments.bench.contestant JOB.json RESULT.json`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients import cohort, trainer
from clients.app import app as client_app
from experiments.bench.bare import BareLoop, lay_out
from experiments.bench.stopwatch import Stopwatch
from experiments.bench.workloads import Workload
from experiments.runner import choose_layout, data_laid_out, open_grid
from fedmm.config.schema import Config
from fedmm.io.files import write_tensors
from fedmm.io.run_directory import RunDirectory
from fedmm.types import Tensors
from server.callbacks import Callback, RoundReport
from server.loop import Server
from server.plan import plan


class Enough(Exception):
    """The last round that counts is over: the final evaluation is not part of the benchmark."""


class Watch(Callback):
    """Laps of the stopwatch, the seconds of local training in them, and a way out of the run.

    Attributes:
        server: Whose run it is.
        cohort: Clients that train as one stack; 1 if they train one by one.
        first: The model after the first round.
    """

    def __init__(self, stopwatch: Stopwatch, training: list[float]) -> None:
        self._stopwatch, self._training = stopwatch, training
        self.server: Server | None = None
        self.cohort = 1
        self.first: Tensors = {}

    def finished_round(self, report: RoundReport) -> None:
        """See `Callback`."""
        samples = sum(int(r.value) for r in report.rows if (r.scope, r.metric) == ("client", "samples"))
        enough = self._stopwatch.lap(samples)
        if report.round == 1 and self.server is not None:
            self.first = dict(self.server.model)
        if enough:
            raise Enough
        if not self._stopwatch.seconds:
            self._training.clear()


def serve(config: Config, grid: Grid, stopwatch: Stopwatch, training: list[float]) -> Watch:
    """Our server loop on any grid until the stopwatch has enough; its watch knows the weights after the first round.

    Args:
        config: What to run.
        grid: Where clients are.
        stopwatch: Told of each round.
        training: Emptied when the warm-up is over; whoever measures training adds to it.
    """
    directory = Path(tempfile.mkdtemp(prefix="fedmm-bench-"))
    watch = Watch(stopwatch, training)
    prepared = plan(config)
    try:
        with data_laid_out(grid, prepared, directory):
            watch.server = Server(prepared, grid, RunDirectory(directory, config), [watch])
            if (crews := watch.server.session.crews) is not None:
                if config.engine.cohort == "auto":
                    crews.cohort = choose_layout(prepared, crews.home).cohort
                watch.cohort = crews.cohort
            training.clear()  # of the probe
            with suppress(Enough):
                watch.server.run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return watch


def ours(config: Config, stopwatch: Stopwatch, training: list[float]) -> Watch:
    """Engine inproc or ray, as configured; samples and layout as `fedmm run` has them."""
    with timed_training(training), open_grid(config) as grid:
        return serve(config, grid, stopwatch, training)


def flower(config: Config, stopwatch: Stopwatch, training: list[float]) -> Watch:
    """The same server and client apps on Flower's own simulation, with `engine.workers` Ray actors of one CPU."""
    from flwr.simulation import run_simulation  # a second of imports that only this contestant needs

    watches: list[Watch] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        watches.append(serve(config, grid, stopwatch, training))

    run_simulation(
        server_app,
        client_app,
        num_supernodes=config.scenario.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": config.engine.workers, "num_gpus": 0, "log_to_driver": False},
        },
    )
    (watch,) = watches
    return watch


def bare(workload: Workload, precision: Any, stopwatch: Stopwatch) -> Tensors:
    """The loop without federation."""
    loop = BareLoop(lay_out(workload, stopwatch.warmup + stopwatch.rounds, precision))
    enough, number, first = False, 0, loop.weights
    while not enough:
        number += 1
        enough = stopwatch.lap(loop.round(number))
        first = loop.weights if number == 1 else first
    return first


@contextmanager
def timed_training(totals: list[float]) -> Iterator[None]:
    """Collect the seconds that this process spends in forward, backward and update of client models.

    Stacks of clients measure it themselves; for clients one by one it is local training without drawing batches.
    """
    one, draw, meter = trainer.train, trainer.batches, cohort.Meter.running

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = one(*args, **options)
        totals.append(time.perf_counter() - start)
        return result

    def drawn(*args: Any, **options: Any) -> Iterator[Any]:
        batches = iter(draw(*args, **options))
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            totals.append(start - time.perf_counter())
            if batch is None:
                return
            yield batch

    @contextmanager
    def running(self: cohort.Meter) -> Iterator[None]:
        before = self.seconds
        with meter(self):
            yield
        totals.append(self.seconds - before)

    with patch.multiple(trainer, train=timed, batches=drawn), patch.object(cohort.Meter, "running", running):
        yield


def main(job_path: Path, result_path: Path) -> None:
    """Run a job and write what the stopwatch says, and the weights."""
    torch.set_num_threads(1)
    job = json.loads(job_path.read_text())
    workload = Workload(**job["workload"])
    stopwatch = Stopwatch(job["warmup"], job["rounds"], job["budget"])
    training: list[float] = []
    cohort = 1
    if job["program"] == "bare":
        weights = bare(workload, job["precision"], stopwatch)
    else:
        config = workload.config(job["engine"], job["warmup"] + job["rounds"], job["precision"])
        watch = {"ours": ours, "flower": flower}[job["program"]](config, stopwatch, training)
        weights, cohort = watch.first, watch.cohort
    write_tensors(Path(job["weights"]), weights)
    result = stopwatch.result() | {"torch": torch.__version__, "training": sum(training), "cohort": cohort}
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
