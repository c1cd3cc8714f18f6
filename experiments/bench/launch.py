"""Start one run of one contestant as a process, and read what it measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

import fedmm
from experiments.bench.bare import for_strangers, lay_out
from experiments.bench.workloads import Precision, Workload
from fedmm.engines.flower import ENVIRONMENT
from fedmm.engines.processes import kill_tree
from fedmm.errors import RunError
from fedmm.types import Tensors

ROOT = Path(fedmm.__file__).resolve().parents[1]
TAIL = 600
TIMEOUT_S = 300.0
"""A run that takes longer is given up."""


@dataclass(frozen=True)
class Contestant:
    """Who trains.

    Attributes:
        name: How tables call it.
        program: "ours" and "flower" run our apps; "bare" and "pfl" can only do FedAvg.
        engine: The `engine` section.
    """

    name: str
    program: Literal["ours", "bare", "flower", "pfl"]
    engine: dict[str, Any]

    def with_workers(self, workers: int) -> Contestant:
        """The same with another number of worker processes."""
        return replace(self, name=f"{self.name} x{workers}", engine=self.engine | {"workers": workers})


def _ours(engine: str, cohort: str) -> Contestant:
    name = engine if cohort == "auto" else f"{engine}, cohort {cohort}"
    return Contestant(name, "ours", {"name": engine, "workers": 2, "cohort": cohort})


BARE = Contestant("bare loop", "bare", {"name": "inproc"})
INPROC_ALONE, INPROC_STACKED, INPROC = (_ours("inproc", cohort) for cohort in ("off", "on", "auto"))
RAY_ALONE, RAY_STACKED, RAY = (_ours("ray", cohort) for cohort in ("off", "on", "auto"))
FLOWER = Contestant("Flower", "flower", {"name": "ray", "workers": 2, "cohort": "off"})
PFL = Contestant("pfl", "pfl", {"name": "inproc"})
OURS = (INPROC_ALONE, INPROC_STACKED, INPROC, RAY_ALONE, RAY_STACKED, RAY)
EVERYBODY = (BARE, *OURS, FLOWER, PFL)


@dataclass(frozen=True)
class Run:
    """What one run of a contestant gave.

    Attributes:
        seconds: Of each round that counts.
        samples: Training samples of these rounds.
        start_up: Seconds from the start of the process to the end of its first round.
        processor: Processor seconds of all its processes during the rounds that count.
        others: Cores that the rest of the machine kept busy meanwhile.
        memory: Bytes of all its processes (proportional set size) after them.
        parameters: Of the model.
        load: Load average of the machine, of one minute, before the start.
        torch: Version of torch.
        cohort: Clients that trained as one stack; 1 if they trained one by one.
        took: Seconds of the process, from start to end.
        training: Seconds in forward, backward and update during the rounds that count; 0 where it cannot be seen.
        weights: The model after the first round.
    """

    seconds: list[float]
    samples: list[int]
    start_up: float
    processor: float
    others: float
    memory: int
    parameters: int
    load: float
    torch: str
    training: float
    cohort: int
    took: float
    weights: Tensors


def launch(
    contestant: Contestant,
    workload: Workload,
    *,
    warmup: int,
    rounds: int,
    budget: float = TIMEOUT_S,
    precision: Precision = "float32",
    pfl_python: Path | None = None,
    timeout: float = TIMEOUT_S,
) -> Run:
    """Run a contestant in a fresh process and return what it measured.

    Args:
        contestant: Who.
        workload: What.
        warmup: Rounds that do not count.
        rounds: Rounds that do.
        budget: Seconds of counted rounds after which a few of them are enough.
        precision: Of model and data.
        pfl_python: Interpreter that has pfl.
        timeout: Seconds until the run is given up.

    Raises:
        RunError: The process failed or did not end in time; the message ends with its last words.
    """
    with _room() as room:
        job: dict[str, Any] = {
            "program": contestant.program,
            "engine": contestant.engine,
            "workload": asdict(workload),
            "precision": precision,
            "warmup": warmup,
            "rounds": rounds,
            "budget": budget,
            "weights": str(room / "weights.safetensors"),
        }
        names: list[str] = []
        if contestant.program == "pfl":
            names = _write_for_pfl(job, workload, room, warmup + rounds, precision)
        (room / "job.json").write_text(json.dumps(job))
        module = "pfl_app" if contestant.program == "pfl" else "contestant"
        python = str(pfl_python) if contestant.program == "pfl" else sys.executable
        load = os.getloadavg()[0]
        began = time.time()
        _wait_for([python, "-m", f"experiments.bench.{module}"], room, contestant, timeout)
        result = json.loads((room / "result.json").read_text())
        if names:
            stored = np.load(job["weights"])
            weights = {n: torch.from_numpy(stored[f"arr_{i}"]) for i, n in enumerate(names)}
        else:
            weights = load_file(job["weights"])
    return Run(
        seconds=result["seconds"],
        samples=result["samples"],
        start_up=result["first_round_at"] - began,
        processor=result["processor"],
        others=result["others"],
        memory=result["memory"],
        parameters=sum(t.numel() for t in weights.values()),
        load=load,
        torch=result["torch"],
        training=result.get("training", 0.0),
        cohort=result.get("cohort", 1),
        took=time.time() - began,
        weights=weights,
    )


def _write_for_pfl(job: dict[str, Any], workload: Workload, room: Path, rounds: int, precision: Precision) -> list[str]:
    setting = lay_out(workload, rounds, precision)
    train = setting.config.train
    np.savez(room / "arrays.npz", **for_strangers(setting))  # type: ignore[arg-type]
    job |= {
        "arrays": str(room / "arrays.npz"),
        "network": setting.network,
        "epochs": train.local_epochs,
        "batch_size": train.batch_size,
        "lr": train.lr,
        "momentum": train.momentum,
        "weights": str(room / "weights.npz"),
    }
    return list(setting.initial)


@contextmanager
def _room() -> Iterator[Path]:
    # Ray's socket paths, inside, must stay below 108 bytes.
    room = Path(tempfile.mkdtemp(prefix="fedmm-b", dir="/tmp" if os.path.isdir("/tmp") else None))
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _wait_for(command: list[str], room: Path, contestant: Contestant, timeout: float) -> None:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(room), "TMPDIR": str(room)}
    log = room / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(room / "job.json"), str(room / "result.json")],
            cwd=room,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RunError(f"did not end within {timeout:.0f} s", where=contestant.name) from None
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()
    if code or not (room / "result.json").exists():
        last = " ".join(log.read_text(errors="replace").split())[-TAIL:]
        raise RunError(f"ended with code {code}: {last}", where=contestant.name)


def pfl_interpreter(home: Path, say: Any) -> Path | None:
    """The interpreter of a virtual environment that has pfl, made on the first call; None if that is impossible.

    Args:
        home: The environment.
        say: Called with a line of text on what happens.
    """
    python = home / "bin" / "python"
    if _has_pfl(python):
        return python
    wanted = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "numpy")]
    say(f"installing pfl with {' and '.join(wanted)} into {home}")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        # Together with our versions of what does the computing, and torch first, as in the Makefile.
        for packages in (wanted, [*wanted, "pfl"]):
            command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
            subprocess.run(command, check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").split()
        say(f"pfl cannot be installed, so it is left out: {' '.join(words)[-300:]}")
        return None
    return python


def _has_pfl(python: Path) -> bool:
    return (
        python.exists()
        and subprocess.run([str(python), "-c", "import pfl, torch"], capture_output=True).returncode == 0
    )
