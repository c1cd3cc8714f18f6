"""A Ray worker that is killed in mid-round costs time and nothing else."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from drill import METHODS, checkpoint, finish, left, living, result, settings, start, undisturbed, wait_for

from experiments.runner import run
from fedmm.errors import ConfigError

LONG = {"train__rounds": 6, "train__local_epochs": 120}


def at_work(session):
    """Workers that compute right now."""
    found = []
    for pid, command in living(session).items():
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "R" and command.startswith("ray::Worker"):
                found.append(pid)
    return found


@pytest.fixture
def expected(tmp_path):
    def of(config):
        undisturbed(tmp_path / "undisturbed", config)
        return result(tmp_path / "undisturbed")

    return of


@pytest.mark.parametrize(
    ("method", "victims"),
    [("cmsfed", 1), *(pytest.param(m, v, marks=pytest.mark.slow) for m in METHODS for v in (1, 2))],
)
def test_killed_from_outside(tmp_path, expected, method, victims):
    config, out = settings(method, **LONG, engine__workers=2), tmp_path / "run"
    process = start(config, out, "--engine", "ray", "--json")
    wait_for(process, checkpoint(out, 2))
    hit = wait_for(process, lambda: len(pids := at_work(process.pid)) >= victims and pids[:victims])
    for pid in hit:
        os.kill(pid, signal.SIGKILL)
    printed, _ = finish(process)
    summary = json.loads(printed)
    assert summary["replies_used"] == summary["replies_expected"]
    assert summary["status"] == "completed"
    assert summary["events"] == 0
    assert result(out) == expected(config)
    assert left(process.pid) == {}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_as_planned(tmp_path, expected, method):
    plan = [{"kind": "kill", "clients": [0, 1, 2, 3], "rounds": [2]}]
    config, out = settings(method, faults=plan), tmp_path / "run"
    printed, _ = finish(start(config, out, "--engine", "ray", "--json"))
    summary = json.loads(printed)
    assert summary["replies_used"] == summary["replies_expected"]
    clean = settings(method)
    assert summary["weights_sha256"] == expected(clean)[0]["weights_sha256"]
    events = json.loads((out / "manifest.json").read_text())["events"]
    assert events
    assert {(e["kind"], e["decision"]) for e in events} == {("error", "asked again (1 of 1)")}


def test_a_planned_kill_needs_workers(tmp_path):
    """In process it would kill the server, and again after every resumption."""
    config = settings("fedavg", faults=[{"kind": "kill"}])
    with pytest.raises(ConfigError, match="engine=ray"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
