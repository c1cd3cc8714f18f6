"""How long a run will take: its first rounds are rehearsed, or its steps timed.

In a rehearsal the run's own server, engine and clients do the first rounds in a temporary directory. Where these
alone would take longer than `REHEARSAL_S`, timed training steps and evaluated samples are multiplied instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import comb
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
from flwr.serverapp import Grid

from clients.probe import Verdict, alike, first_samples, step_seconds
from clients.workspace import Workspace
from experiments.runner import first_broadcast
from experiments.volumes import Volumes, in_buffer
from fedmm.config.schema import Config
from fedmm.data.federation import Federation
from fedmm.engines.clock import Work, task_seconds
from fedmm.engines.costs import training_flops
from fedmm.engines.devices import build_fleet
from fedmm.engines.grid import WorkingGrid
from fedmm.io.run_directory import RunDirectory
from fedmm.jobs import Job, Measure, Observe
from fedmm.metrics.local import evaluate_samples
from fedmm.spec import client_spec
from fedmm.types import SPLITS
from server.callbacks import Callback, RoundReport
from server.facts import Federates
from server.knowledge import KNOWLEDGE
from server.loop import Server
from server.plan import Plan

REHEARSAL_S = 10.0
"""A rehearsal may be expected to take this long."""

_ROUNDS = 2, 6  # fewest and most of a rehearsal; the first is not like the others
_SAMPLES = 64
_STEPS = 4  # of each client, where steps are timed
_PASSES = {"accuracy": 1, "discrepancy": 1, "coalitions": 2, "gradients": 4}  # of an observation, in forward passes


@dataclass(frozen=True)
class Seconds:
    """Where the time of a run goes.

    Attributes:
        start: Loading libraries and data, spreading them, starting processes, meeting the clients.
        bootstrap: Round 0, if there is one.
        rounds: All rounds without evaluations and observations.
        evaluations: Validations of rounds.
        observations: Observations of the observatory.
        final: Probes, validation and test at the end, files, stopping processes.
        round: A round without evaluation and observation.
        evaluation: One validation.
        observation: One observation.
        rehearsed: Whether rounds were run, or only steps timed.
        devices: Simulated seconds of training on the configured devices, if there are any.
    """

    start: float
    bootstrap: float
    rounds: float
    evaluations: float
    observations: float
    final: float
    round: float
    evaluation: float
    observation: float
    rehearsed: bool
    devices: float | None = None

    @property
    def total(self) -> float:
        """Wall time of the command."""
        return self.start + self.bootstrap + self.rounds + self.evaluations + self.observations + self.final


def seconds_of(prepared: Plan, here: Workspace, layout: Verdict, grid: Grid, folder: Path, started: float) -> Seconds:
    """Rehearse a run, or estimate it where that would take long.

    Args:
        prepared: The run.
        here: Its workspace in this process.
        layout: How clients train.
        grid: Where they are, with a crew.
        folder: For the rehearsal's files.
        started: Seconds that the start took.
    """
    return _Timing(prepared, here, layout, cast(WorkingGrid, grid), folder).seconds(started)


@dataclass
class _Watch(Callback):
    """Notes when a run reaches what."""

    started_at: float = 0.0
    ended_at: float = 0.0
    rounds: list[tuple[float, float]] = field(default_factory=list)

    def started(self, first_round: int, rounds: int) -> None:
        """See `Callback`."""
        self.started_at = perf_counter()

    def finished_round(self, report: RoundReport) -> None:
        """See `Callback`."""
        self.rounds.append((perf_counter(), report.seconds))

    def ended(self, summary: dict[str, Any]) -> None:
        """See `Callback`."""
        self.ended_at = perf_counter()


class _TimedGrid:
    """A grid that also notes how long validations take, and observations with the probes that they need."""

    def __init__(self, grid: WorkingGrid) -> None:
        self._grid = grid
        self.crew, self.processes, self.home = grid.crew, grid.processes, grid.home
        self.validations: list[float] = []
        self.observations: list[float] = []
        self._probing = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def work(self, jobs: Sequence[Job], shared: Any, *, timeout: float | None = None) -> Iterator[tuple[Any, Any]]:
        """See `WorkingGrid.work`."""
        began = perf_counter()
        yield from self._grid.work(jobs, shared, timeout=timeout)
        seconds, first = perf_counter() - began, jobs[0]
        if isinstance(first, Observe):
            self.observations.append(self._probing + seconds)
            self._probing = 0.0
        elif isinstance(first, Measure) and first.request == "moments":
            self._probing = seconds
        elif isinstance(first, Measure) and first.split == "val":
            self.validations.append(seconds)


class _Timing:
    """Finds the time of a run on an open grid."""

    def __init__(self, prepared: Plan, here: Workspace, layout: Verdict, grid: WorkingGrid, folder: Path) -> None:
        self._plan, self._here, self._layout = prepared, here, layout
        self._grid, self._folder = grid, folder
        self._config = prepared.config
        # As many clients as make a version; of those who come in twice, one stands for both.
        replies = in_buffer(prepared.config) or prepared.config.train.clients_per_round
        self._count = min(replies, prepared.config.scenario.clients)
        self._kinds = prepared.objective.knowledge() | prepared.selector.knowledge() | prepared.strategy.needs
        self._bootstraps = any(KNOWLEDGE[kind].bootstrap for kind in self._kinds)

    def seconds(self, started: float) -> Seconds:
        """Rehearse, or estimate where that would take long."""
        guess = self._estimate(started)
        fewest, most = _ROUNDS
        spare = REHEARSAL_S - guess.bootstrap - guess.final
        each = guess.round + guess.evaluation + guess.observation
        rounds = min(most, self._config.train.rounds, int(spare / max(each, 1e-9)))
        if rounds < min(fewest, self._config.train.rounds) or self._config.engine.name == "flower":
            return self._estimate(started, self._sample())
        return self._rehearse(started, rounds)

    def _sample(self) -> float:
        """Seconds to train a client on one sample, from the first batches of as many clients as train together."""
        here, batch = self._here, self._config.train.batch_size
        pool = here.pool("train")
        clients = alike(pool, self._layout.cohort)
        broadcast = first_broadcast(self._plan, self._federates())
        step = min(step_seconds(here, clients, broadcast, steps=_STEPS) for _ in range(2))
        # The last batch of an epoch is smaller than the others, and quicker.
        sizes = np.minimum(pool.sizes[clients], _STEPS * batch)
        return step * float(np.sum(-(-sizes // batch)) / np.sum(sizes))

    def _federates(self) -> Federates:
        pool = self._here.pool("train")
        return Federates(self._plan.dataset.modalities, pool.owned, tuple(map(int, pool.sizes)))

    def _estimate(self, started: float, sample: float | None = None) -> Seconds:
        """From the time of steps as the layout was chosen by, or of training on a sample."""
        config, here, t = self._config, self._here, self._config.train
        pool = here.pool("train")
        clients = alike(pool, 1)
        step = self._layout.seconds.get(self._layout.cohort) or min(
            step_seconds(here, clients, first_broadcast(self._plan, self._federates()), steps=n) for n in (1, 2)
        )
        look = _sample_seconds(here)
        statistics = look * pool.sizes if any(KNOWLEDGE[kind].requests for kind in self._kinds) else 0 * pool.sizes
        epoch = step * -(-pool.sizes // t.batch_size) if sample is None else sample * pool.sizes
        jobs = -(-self._count // self._layout.cohort)
        together = 1 if config.engine.name == "inproc" else min(config.engine.workers, os.cpu_count() or 1, jobs)
        round = self._count * float(np.mean(t.local_epochs * epoch + statistics)) / together
        bootstrap = float(np.sum(epoch + statistics)) / together
        looks = {split: look * float(here.pool(split).sizes.sum()) / together for split in SPLITS}
        final = looks["val"] + looks["test"] + (looks["train"] if config.evaluate.probe else 0.0)
        observation = 0.0
        if config.observe.every is not None:
            probing = looks["train"] if config.evaluate.probe and "accuracy" in config.observe.what else 0.0
            observation = probing + looks[config.observe.split] * sum(_PASSES[kind] for kind in config.observe.on_model)
        return Seconds(
            started,
            bootstrap if self._bootstraps else 0.0,
            t.rounds * round,
            _evaluations(config) * looks["val"],
            _observations(config) * observation,
            final,
            round,
            looks["val"],
            observation,
            rehearsed=False,
        )

    def _rehearse(self, started: float, rounds: int) -> Seconds:
        """Run the first rounds, and take those after the first for all that follow."""
        c = self._config
        config = c.model_copy(
            update={
                "train": c.train.model_copy(update={"rounds": rounds, "clients_per_round": self._count}),
                "evaluate": c.evaluate.model_copy(update={"every": 1}),
                "observe": c.observe.model_copy(update={"every": c.observe.every and 1}),
                "faults": [],
                "devices": None,
            }
        )
        prepared = replace(self._plan, config=config, spec=client_spec(config))
        directory, watch, grid = RunDirectory(self._folder / "run", config), _Watch(), _TimedGrid(self._grid)
        server = Server(prepared, cast(Grid, grid), directory, [watch])
        if server.session.crews is not None:
            server.session.crews.cohort = self._layout.cohort
        directory.finish(server.run())
        ended = perf_counter()
        validations = grid.validations[:rounds]
        observations = grid.observations or [0.0] * rounds
        spent = zip(watch.rounds, validations, observations, strict=True)
        bare = [seconds - looked - observed for (_, seconds), looked, observed in spent]
        usual = float(np.mean(bare[1:])) if rounds > 1 else bare[0]
        look = float(np.mean(validations[1:])) if rounds > 1 else validations[0]
        observation = float(np.mean(observations[1:])) if rounds > 1 else observations[0]
        first_at, first_seconds = watch.rounds[0]
        return Seconds(
            started,
            max(0.0, first_at - first_seconds - watch.started_at) if self._bootstraps else 0.0,
            bare[0] + (c.train.rounds - 1) * usual,
            validations[0] + (_evaluations(c) - 1) * look,
            _observations(c) * observation,
            ended - watch.rounds[-1][0],
            usual,
            look,
            observation,
            rehearsed=True,
        )


def _evaluations(config: Config) -> int:
    rounds, every = config.train.rounds, config.evaluate.every
    return rounds // every + (rounds % every > 0)


def _observations(config: Config) -> int:
    rounds = config.train.rounds
    return sum(config.observe.due(round, rounds) for round in range(1, rounds + 1))


def _sample_seconds(here: Workspace) -> float:
    """Seconds to measure the model on one sample."""
    split = next((s for s in ("val", "test") if here.pool(s).sizes.sum()), "train")
    pool = here.pool(split)
    data = first_samples(pool, [int(np.argmax(pool.sizes))], _SAMPLES).client(0)
    laps = []
    for _ in range(2):
        began = perf_counter()
        evaluate_samples(here.model, data, {})
        laps.append(perf_counter() - began)
    return min(laps) / len(data)


def simulated_seconds(prepared: Plan, federation: Federation, sent: Volumes) -> float:
    """Simulated seconds of all rounds, for devices that stay available and answer: the slowest of each round's picks.

    Picks are uniform, messages of average size: E[max of m of K] = sum_j t_(j) C(j-1, m-1) / C(K, m).
    """
    config = prepared.config
    assert config.devices is not None
    count, t, size = config.train.clients_per_round, config.train, in_buffer(config)
    down, up = sent.message
    times = []
    for k, profile in enumerate(build_fleet(config.devices, len(federation), config.seed)):
        flops = training_flops(prepared.model, prepared.dataset.specs, federation.modalities(k, "train"))
        work = Work(len(federation.indices["train"][k]), profile.local_epochs or t.local_epochs, flops, down, up)
        times.append(task_seconds(profile, work))
    if size is not None:  # so many train at any time
        return t.rounds * size * float(np.mean(times)) / config.devices.buffer.concurrency
    ways = comb(len(times), count)
    return t.rounds * sum(s * (comb(j, count - 1) / ways) for j, s in enumerate(sorted(times)))
