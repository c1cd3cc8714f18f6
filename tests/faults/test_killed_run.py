"""A run that is killed or interrupted at any moment, and resumed, gives the same result as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
from drill import METHODS, checkpoint, finish, kill, left, living, result, settings, start, undisturbed, wait_for

from experiments.runner import run
from fedmm.io.run_directory import read_summary

ROUNDS = 20


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Results by method, made when asked for."""
    found = {}

    def of(method):
        if method not in found:
            out = tmp_path_factory.mktemp(method) / "run"
            undisturbed(out, settings(method, train__rounds=ROUNDS))
            found[method] = result(out)
        return found[method]

    return of


@pytest.mark.parametrize("method", METHODS)
def test_killed_once(tmp_path, expected, method):
    config, out, rng = settings(method, train__rounds=ROUNDS), tmp_path / "run", random.Random(method)
    process = start(config, out)
    wait_for(process, checkpoint(out, rng.randint(1, ROUNDS // 2)))
    time.sleep(rng.uniform(0, 0.05))
    kill(process)
    assert read_summary(out) is None
    finish(start(config, out, "--resume"))
    assert result(out) == expected(method)


@pytest.mark.parametrize(
    ("method", "kept"), [("fedavg", []), pytest.param("cmsfed", ["round-000000.json"], marks=pytest.mark.slow)]
)
def test_killed_before_the_first_checkpoint(tmp_path, expected, method, kept):
    """Nothing is kept yet, or the bootstrap alone."""
    config, out = settings(method, train__rounds=ROUNDS, checkpoint__every=1000), tmp_path / "run"
    process = start(config, out)
    wait_for(process, lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 9000)
    kill(process)
    assert [path.name for path in (out / "checkpoints").glob("*.json")] == kept
    finish(start(config, out, "--resume"))
    assert result(out) == expected(method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_again_and_again_at_any_moment(tmp_path, expected, method, seed):
    config, out, rng = settings(method, train__rounds=ROUNDS), tmp_path / "run", random.Random(f"{method} {seed}")
    killed = 0
    for _ in range(8):
        process = start(config, out, "--resume")
        try:
            process.communicate(timeout=rng.uniform(0.2, 2.2))
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
        else:
            assert process.returncode == 0
            break
    finish(start(config, out, "--resume"))
    assert killed
    assert result(out) == expected(method)


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("ray", "inproc"), ("inproc", "ray"), ("ray", "ray")])
def test_killed_on_one_engine_and_resumed_on_another(tmp_path, expected, engines):
    config, out = settings("cmsfed", train__rounds=ROUNDS), tmp_path / "run"
    process = start(config, out, "--engine", engines[0])
    wait_for(process, checkpoint(out, 4))
    kill(process)
    assert left(process.pid) == {}
    finish(start(config, out, "--engine", engines[1], "--resume"))
    assert result(out) == expected("cmsfed")


@pytest.mark.parametrize("engine", ["inproc", "ray"])
def test_ctrl_c_ends_soon_leaves_nothing_running_and_is_resumable(tmp_path, expected, engine):
    config, out = settings("fedcmi", train__rounds=ROUNDS), tmp_path / "run"
    process = start(config, out, "--engine", engine, "--json")
    wait_for(process, checkpoint(out, 2))
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = finish(process, 6)
    assert time.monotonic() - began < 5
    assert printed == ""
    assert "--resume" in errors
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    assert left(process.pid, 10) == {}
    finish(start(config, out, "--resume"))
    assert result(out) == expected("fedcmi")


def test_killed_between_the_test_and_the_summary(tmp_path, expected):
    config = settings("fedcmi", train__rounds=ROUNDS)
    undisturbed(tmp_path, config)
    (tmp_path / "summary.json").unlink()
    run(config, tmp_path, resume=True)
    assert result(tmp_path) == expected("fedcmi")


def test_resuming_a_finished_run_changes_no_file(tmp_path):
    config = settings("fedavg")
    undisturbed(tmp_path, config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "federation" in json.loads(before[tmp_path / "manifest.json"])
    run(config.model_copy(update={"engine": config.engine.model_copy(update={"workers": 3})}), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_processes_of_a_run_are_found(tmp_path):
    process = start(settings("fedavg"), tmp_path / "run")
    assert process.pid in living(process.pid)
    kill(process)
    assert left(process.pid) == {}
