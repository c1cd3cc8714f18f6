"""What the README shows works as shown: every command, both examples, the names of files."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import TABLES, app
from fedmm.config.schema import DataConfig
from fedmm.testing.dataset import check_dataset
from fedmm.testing.objective import check_objective

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


DEMO, TOUR, OWN_DATA, OWN_METHOD = [
    [line.partition(" #")[0].strip() for line in block.splitlines()] for block in blocks("bash")
]
CODE = dict(zip(re.findall(r"`(my\w+)\.py`", README), blocks("python"), strict=True))
LINES = {"mydata": 40, "mymethod": 30}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the shipped configurations where the README has them."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "configs").symlink_to(ROOT / "experiments" / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def console(command, *more):
    """Run a command as a user does, by the installed script, with nothing on the path but what is installed."""
    program, *arguments = [*shlex.split(command), *more]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([SCRIPTS / program, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def invoke(command, *more):
    """Run a command here, without starting Python anew."""
    program, *arguments = [*shlex.split(command), *more]
    assert program == "fedmm"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


def test_the_tour(here):
    """In order, because some commands go on from others; comparisons have a test of their own."""
    assert {line.split()[1] for line in TOUR} == {
        "run",
        "plan",
        "card",
        "compare",
        "report",
        "list",
        "explain",
        "data",
        "doctor",
    }
    shown = {}
    for line in TOUR:
        if line.startswith("fedmm run"):
            shown[line] = invoke(line, "train.rounds=1")
        elif line == "fedmm doctor":
            # Its verdict is on this machine: too little memory is no fault of the README.
            shown[line] = CliRunner().invoke(app, ["doctor"]).stdout
        elif not line.startswith("fedmm compare"):
            shown[line] = invoke(line)
    assert all(shown.values())
    assert summary(here / "runs" / "mine")["method"] == "cmsfed"
    assert summary(here / "runs" / "mine")["seed"] == 7
    assert (here / "runs" / "mine-report" / "report.html").stat().st_size > 10_000
    assert "cmsfed" in shown["fedmm list methods"]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in TOUR if "compare" in line])
def test_the_tours_comparison(here, line):
    console(line)
    assert (here / "runs" / "try" / "report.html").exists()


@pytest.mark.slow
def test_the_demo(here):
    assert DEMO == ["make demo"]
    printed = subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in printed.stdout.splitlines() if line.startswith(".venv/bin/fedmm")]
    table = console(line.removeprefix(".venv/bin/"), "train.rounds=1", "seeds=1", "engine=inproc")
    assert all(word in table for word in ("fedavg", "fedcmi", "cmsfed"))
    for name in ("report.html", "table.md", "table.csv", "table.tex"):
        assert (here / "runs" / "demo" / name).stat().st_size > 0


def save(name):
    assert len(CODE[name].splitlines()) <= LINES[name]
    Path(f"{name}.py").write_text(CODE[name])


@pytest.mark.parametrize(
    "engine", ["inproc", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ray", "flower"))]
)
@pytest.mark.parametrize(
    ("name", "lines", "method"), [("mydata", OWN_DATA, "fedcmi"), ("mymethod", OWN_METHOD, "fedcmi")]
)
def test_ones_own(here, name, lines, method, engine):
    save(name)
    for line in lines:
        console(line, "train.rounds=2", f"engine={engine}")
    found = summary(here / "runs" / name)
    assert found["status"] == "completed"
    assert found["engine"] == engine
    assert found["method"] == method
    assert found["test"]["accuracy"] > (0.5 if name == "mydata" else 0)


def test_the_example_data_are_sound_and_the_example_method_keeps_the_contract(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    for name in CODE:
        save(name)
    import mydata
    import mymethod

    check_dataset(mydata.load(DataConfig()))
    check_objective(mymethod.Confident(beta=0.2))
    for name in CODE:
        del sys.modules[name]


def test_a_file_in_the_working_directory_hides_no_package(here):
    (here / "server").mkdir()
    for name in ("server/__init__.py", "torch.py", "json.py", "fedmm.py", "clients.py"):
        (here / name).write_text("raise SystemExit('the wrong file')\n")
    assert "cmsfed" in console("fedmm list")


def test_what_is_listed_can_be_listed():
    (line,) = [line for line in README.splitlines() if line.startswith("fedmm list")]
    assert {word.strip() for word in line.split("also")[1].rstrip(". ").split(",")} <= set(TABLES)


def test_every_file_and_place_named_exists():
    named = re.findall(r"`((?:\w+/)+[\w.]*)`", README) + re.findall(r"\]\((?!http)([^)]+)\)", README)
    made = [name for name in named if not name.startswith("runs/")]
    assert made
    assert [name for name in made if not (ROOT / name).exists()] == []


def with_variable(name, value):
    """Ids of the processes that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if f"{name}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_flwr_run(tmp_path):
    """As shown, in a checkout, with a home of its own, which also tells its background processes apart."""
    (shown,) = re.findall(r"`((?:\w+=\w+ )+flwr run \.)`", README)
    *variables, program, verb, place = shlex.split(shown)
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.strip("\0").split("\0"):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    keys = set(tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])
    assert keys == {"config", "set", "out", "resume"}
    home.mkdir()
    settings = dict(variable.split("=") for variable in variables)
    environment = {**os.environ, **settings, "FLWR_HOME": str(home), "PATH": f"{SCRIPTS}:{os.environ['PATH']}"}
    config = f"set='data=synthetic data.samples=200 train.rounds=2 train.clients_per_round=2' out='{tmp_path / 'out'}'"
    try:
        done = subprocess.run(
            [program, verb, place, "--stream", "--run-config", config],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
        )
    finally:
        for pid in with_variable("FLWR_HOME", str(home)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "out" / "summary.json").exists(), done.stdout + done.stderr
    assert summary(tmp_path / "out")["status"] == "completed"
    assert summary(tmp_path / "out")["rounds"] == 2
