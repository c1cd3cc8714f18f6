"""The guard around every command, with commands that fail in all ways there are."""

import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from experiments import interrupts
from experiments.guard import Guarded
from fedmm.errors import CheckpointError, ConfigError, DataError, FedmmError, Interrupted, RunError

FAILURES = {
    "config": (ConfigError("is wrong", where="train.lr", remedy="lower it"), 2, "train.lr: is wrong (lower it)"),
    "data": (DataError("are gone"), 3, "are gone"),
    "checkpoint": (CheckpointError("is torn"), 3, "is torn"),
    "run": (RunError("stopped"), 4, "stopped"),
    "any": (FedmmError("failed"), 4, "failed"),
    "interrupted": (Interrupted("stopped", remedy="--resume"), 6, "--resume"),
    "keyboard": (KeyboardInterrupt(), 6, "interrupted"),
    "read-only": (OSError(30, "Read-only file system", "/runs/x"), 4, "/runs/x: Read-only file system"),
    "full": (OSError(28, "No space left on device"), 4, "No space left"),
    "missing": (FileNotFoundError(2, "No such file or directory", "/x"), 4, "/x: No such file"),
    "bug": (RuntimeError("boom"), 4, "unexpected error: RuntimeError: boom; set FEDMM_DEBUG=1"),
    "exit": (typer.Exit(5), 5, ""),
    "usage": (typer.BadParameter("no"), 2, "no"),
}


def guarded():
    app = typer.Typer(cls=Guarded)

    @app.command()
    def fail(kind: str) -> None:
        raise FAILURES[kind][0]

    @app.command()
    def other() -> None:
        pass

    return app


@pytest.mark.parametrize("kind", FAILURES)
def test_every_failure_has_its_code_and_message(monkeypatch, kind):
    monkeypatch.delenv("FEDMM_DEBUG", raising=False)
    _, code, message = FAILURES[kind]
    result = CliRunner().invoke(guarded(), ["fail", kind])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_an_interrupt_that_became_another_error_is_an_interrupt(monkeypatch):
    """Libraries turn a `KeyboardInterrupt` into errors of their own."""
    monkeypatch.setattr(interrupts._state, "asked", True)
    result = CliRunner().invoke(guarded(), ["fail", "bug"])
    assert (result.exit_code, result.stderr) == (6, "fedmm: interrupted\n")


def test_a_process_that_is_being_started_does_not_answer_ctrl_c_for_the_program():
    code = """
import os, signal, sys
from experiments import interrupts
interrupts.install()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGINT)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_trace_is_there_for_the_asking(monkeypatch):
    monkeypatch.setenv("FEDMM_DEBUG", "1")
    result = CliRunner().invoke(guarded(), ["fail", "bug"])
    assert result.exit_code == 4
    assert "Traceback" in result.stderr
    assert result.stdout == ""


def test_stdout_is_quiet_whoever_prints_and_comes_back():
    code = """
import contextlib, os, subprocess, sys
from experiments.guard import quiet_stdout
with contextlib.suppress(RuntimeError), quiet_stdout():
    print("a library")
    os.write(1, b"native code")
    subprocess.run([sys.executable, "-c", "print('a child')"])
    raise RuntimeError
print("result")
"""
    environment = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "result\n"
    assert all(text in done.stderr for text in ("a library", "native code", "a child"))


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_done():
    result = CliRunner().invoke(guarded(), ["fail", "run\udcff"])
    assert result.exit_code == 2
    assert "'run\\udcff' is not UTF-8" in result.stderr
