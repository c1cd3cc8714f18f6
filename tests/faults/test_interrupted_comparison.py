"""A comparison in several processes: Ctrl-C ends it soon, a killed process ends it with a remedy, and it goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from drill import ROOT, checkpoint, finish, left, living, wait_for

RUNS = ["methods=[fedavg, fedcmi, cmsfed]", "seeds=2", "data=synthetic", "data.samples=280", "scenario.clients=6"]
SIZE = ["train.clients_per_round=3", "train.rounds=40", "train.local_epochs=1"]


def start(out):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", "compare", *RUNS, *SIZE, "--jobs", "2", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (lambda p: os.killpg(p.pid, signal.SIGINT), 6, "the same command goes on"),
        (lambda p: os.kill(p.pid, signal.SIGINT), 6, "the same command goes on"),
        (lambda p: os.kill(max(living(p.pid)), signal.SIGKILL), 4, "was killed"),
    ],
    ids=["ctrl-c", "parent alone", "a killed process"],
)
def test_ended_and_gone_on_with(tmp_path, end, code, message):
    process = start(tmp_path)
    wait_for(process, lambda: any(checkpoint(out, 5)() for out in tmp_path.glob("default/*/*")))
    began = time.monotonic()
    end(process)
    _, errors = finish(process, code)
    assert time.monotonic() - began < 10
    assert message in errors
    assert left(process.pid) == {}
    finish(start(tmp_path))
    found = [json.loads(path.read_text()) for path in tmp_path.glob("default/*/*/summary.json")]
    assert [summary["status"] for summary in found] == ["completed"] * 6
    assert (tmp_path / "report.html").exists()
