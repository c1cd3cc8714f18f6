"""Ctrl-C at any moment of a run: over in five seconds, exit code 6, no trace, nothing left running."""

import os
import random
import signal
import time

import pytest
from drill import checkpoint, finish, left, living, mapped, ray_files, result, settings, start, undisturbed, wait_for

ROUNDS = 30
SLOW = pytest.mark.slow


def has(process, word):
    """Whether a process of this name runs below it."""
    return any(word in command for command in living(process.pid).values())


def importing(process, out):
    wait_for(process, lambda: mapped(process, "pydantic_core"))


def importing_torch(process, out):
    wait_for(process, lambda: mapped(process, "libtorch"))


def ray_starts(process, out):
    wait_for(process, lambda: has(process, "gcs_server"))


def workers_start(process, out):
    wait_for(process, lambda: has(process, "default_worker.py") or has(process, "ray::"))


def writing(process, out):
    wait_for(process, checkpoint(out, 1))
    wait_for(process, lambda: any((out / "checkpoints").glob("*.part")))


def in_a_round(process, out):
    wait_for(process, checkpoint(out, 2))
    time.sleep(random.uniform(0, 0.3))


def at_the_end(process, out):
    wait_for(process, checkpoint(out, ROUNDS))


MOMENTS = {
    f.__name__: f for f in (importing, importing_torch, ray_starts, workers_start, writing, in_a_round, at_the_end)
}
FAST = {("inproc", "importing", True), ("ray", "ray_starts", True), ("inproc", "in_a_round", False)}


def cases():
    for engine in ("inproc", "ray"):
        for name in MOMENTS:
            if engine == "inproc" and name in ("ray_starts", "workers_start"):
                continue
            for group in (True, False):
                marks = () if (engine, name, group) in FAST else SLOW
                yield pytest.param(
                    engine, name, group, marks=marks, id=f"{engine}-{name}-{'group' if group else 'alone'}"
                )


@pytest.mark.parametrize(("engine", "moment", "group"), list(cases()))
def test_interrupted(tmp_path, engine, moment, group):
    config = settings("fedcmi", train__rounds=ROUNDS, engine__workers=2, model__width=256)
    out = tmp_path / "run"
    process = start(config, out, "--engine", engine, "--json")
    MOMENTS[moment](process, out)
    began = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    printed, errors = finish(process, 6)
    assert time.monotonic() - began < 5
    assert printed == ""
    (message,) = [line for line in errors.splitlines() if line.startswith("fedmm: ")]
    assert "interrupted" in message
    assert left(process.pid, 3) == {}
    assert ray_files(process) == []
    if list((out / "checkpoints").glob("*.json")) or moment == "in_a_round":
        finish(start(config, out, "--resume"))
        undisturbed(tmp_path / "undisturbed", config)
        assert result(out) == result(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_interrupted_at_random_and_twice(tmp_path, seed):
    """The second Ctrl-C comes while the first is dealt with."""
    rng = random.Random(seed)
    process = start(settings("cmsfed", train__rounds=1000), tmp_path / "run", "--engine", "ray")
    wait_for(process, lambda: mapped(process, "pydantic_core"))
    time.sleep(rng.uniform(0, 6))
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(rng.uniform(0, 0.5))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    finish(process, 6)
    assert time.monotonic() - began < 5
    assert left(process.pid, 3) == {}
    assert ray_files(process) == []


def test_a_batch_systems_signal_is_the_same(tmp_path):
    out = tmp_path / "run"
    process = start(settings("fedavg", train__rounds=1000), out, "--engine", "inproc")
    wait_for(process, checkpoint(out, 2))
    process.terminate()
    _, errors = finish(process, 6)
    assert "--resume" in errors
