"""Flower's own simulation, driven by our launcher."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from support import CLIENTS, arrays, by_partition, messages, variables

from fedmm.engines import flower
from fedmm.engines.flower import run_flower, stage_app
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import RunError

HERE = Path(__file__).parent


def test_the_staged_app_holds_the_packages_and_the_configuration(tmp_path):
    config = {"text": 'a "quoted"\nline = é', "n": 3, "x": 1e-05, "yes": True}
    app = stage_app(tmp_path / "app", "echo_server:app", "echo_app:app", config)
    read = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert read["config"] == config
    assert read["components"] == {"serverapp": "echo_server:app", "clientapp": "echo_app:app"}
    assert {path.name for path in app.iterdir()} == {"pyproject.toml", "fedmm", "echo_app.py", "echo_server.py"}
    assert (app / "fedmm" / "engines" / "flower.py").exists()
    assert {path.suffix for path in app.rglob("*") if path.is_file()} <= {".py", ".json", ".md", ".yaml", ".toml"}


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(RunError, match="no_such_package"):
        stage_app(tmp_path / "app", "no_such_package.app:app", "echo_app:app", {})


def test_a_status_that_is_not_told_in_time_is_unknown(monkeypatch):
    def late(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", late)
    status, details = flower._status(dict(os.environ))
    assert status == flower.UNKNOWN
    assert "60 s" in details


MARK = "FEDMM_TEST_MARK"


def homes(mark):
    """Flower's home of each living process that it started below this test; others may run Flower beside it."""
    there = [found for found in variables().values() if found.get(MARK) == mark]
    return [Path(found["FLWR_HOME"]).parent for found in there if "FLWR_HOME" in found]


@pytest.mark.slow
def test_same_numbers_as_in_process_and_nothing_left(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    config = {"fail": False, "text": "", "rounds": 2, "out": str(tmp_path / "out.json")}
    seen, there = [], []

    def look(line):
        seen.append(line)
        there.extend(homes(str(tmp_path)))

    run_flower("echo_server:app", "echo_app:app", config, nodes=CLIENTS, workers=2, log=tmp_path / "log", on_line=look)
    here = InProcessGrid("echo_app:app", CLIENTS)
    expected = []
    for number in range(2):
        replies = by_partition(here, here.send_and_receive(messages(here, record=arrays(number))))
        expected.append({str(p): [data.hex(), calls] for p, (data, calls) in replies.items()})
    assert json.loads((tmp_path / "out.json").read_text()) == expected
    assert any("round 1" in line for line in seen)
    assert "round 1" in (tmp_path / "log").read_text()
    (home,) = set(there)
    assert homes(str(tmp_path)) == []
    assert not home.exists()


@pytest.mark.slow
def test_a_failed_run_is_an_error_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path))
    config = {"fail": True, "text": "the reason", "rounds": 1, "out": ""}
    with pytest.raises(RunError, match=r"finished:failed: .*the reason"):
        run_flower("echo_server:app", "echo_app:app", config, nodes=2, workers=1, log=tmp_path / "log")
    assert homes(str(tmp_path)) == []


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from fedmm.engines.flower import run_flower
config = dict(fail=False, text="", rounds=10000, out="")
run_flower("echo_server:app", "echo_app:app", config, nodes=2, workers=1, log=Path("log"), on_line=print)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_launcher_leaves_no_process(tmp_path, sent):
    program = PROGRAM.format(path=[str(HERE), str(HERE.parents[1])])
    launcher = subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=tmp_path,
        env={**os.environ, MARK: str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in launcher.stdout:
        if "round 3" in line:
            break
    (home,) = set(homes(str(tmp_path)))
    assert home.exists()
    launcher.send_signal(sent)
    _, err = launcher.communicate(timeout=60)
    assert ("KeyboardInterrupt" in err) == (sent == signal.SIGINT)
    limit = time.monotonic() + 30  # the machine may be busy
    while (homes(str(tmp_path)) or home.exists()) and time.monotonic() < limit:
        time.sleep(0.5)
    assert homes(str(tmp_path)) == []
    assert not home.exists()
