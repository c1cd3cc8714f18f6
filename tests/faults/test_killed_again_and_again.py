"""Ten workers killed in one run, at all sorts of moments: nothing is lost but time."""

import os
import signal
import threading
import time
from dataclasses import dataclass

import pytest
from drill import result, settings, undisturbed

from experiments.runner import CLIENT_APP, CREW, run
from fedmm.engines.processes import is_alive
from fedmm.engines.ray_workers import RayGrid, RayPool

WORKERS = 2


@dataclass(frozen=True)
class Blow:
    """Kill `victims` workers when jobs of a kind are handed out: while all are idle, or when they have them."""

    kind: str
    busy: bool
    victims: int


BLOWS = [
    Blow("Train", True, 1),
    Blow("Measure", True, 1),
    Blow("Train", False, 1),
    Blow("Train", True, 2),
    Blow("Measure", False, 1),
    Blow("Measure", True, 2),
    Blow("Train", False, 2),
]
assert sum(blow.victims for blow in BLOWS) == 10


class Battered(RayGrid):
    """A grid whose workers are killed as `BLOWS` says, each blow when all have recovered from the one before."""

    def __init__(self, pool, clients):
        super().__init__(pool, clients)
        self.todo, self.killed, self.seconds = list(BLOWS), 0, []

    def work(self, jobs, shared, *, timeout=None):
        if not self.todo or type(jobs[0]).__name__ != self.todo[0].kind:
            yield from super().work(jobs, shared, timeout=timeout)
            return
        blow = self.todo.pop(0)
        self._pool.wait(WORKERS)
        # Not by their titles, which Ray gives them a little later.
        there = [self._pool._pids[worker] for worker in self._pool._idle]
        assert len(there) == WORKERS, there
        killer = threading.Timer(0.15, self.kill, (there[: blow.victims], there))
        if blow.busy:
            # Stopped, they take their jobs and are sure to be in the middle of them.
            for pid in there:
                os.kill(pid, signal.SIGSTOP)
            killer.start()
        else:
            self.kill(there[: blow.victims], [])
        began = time.monotonic()
        yield from super().work(jobs, shared, timeout=timeout)
        self.seconds.append(time.monotonic() - began)

    def kill(self, victims, stopped):
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1
            # Whoever is still dying could be taken for one that lives, and be killed again.
            while is_alive(pid):
                time.sleep(0.001)
        for pid in set(stopped) - set(victims):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cohort"), [("cmsfed", "on"), ("fedcmi", "off")])
def test_ten_workers_killed_in_one_run(tmp_path, method, cohort):
    config = settings(method, train__rounds=8, engine__workers=WORKERS, engine__cohort=cohort)
    undisturbed(tmp_path / "undisturbed", config)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "ray"})})
    with RayPool(CLIENT_APP, WORKERS, CREW) as pool:
        grid = Battered(pool, config.scenario.clients)
        summary = run(config, tmp_path / "run", grid=grid)
        deaths = pool.deaths
    print("seconds:", [round(s, 2) for s in grid.seconds])
    assert grid.todo == []
    assert grid.killed == 10
    assert deaths == 10
    assert summary["status"] == "completed"
    assert summary["events"] == 0
    assert summary["replies_used"] == summary["replies_expected"]
    assert result(tmp_path / "run") == result(tmp_path / "undisturbed")
