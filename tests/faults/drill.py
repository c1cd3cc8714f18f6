"""Real `fedmm run` processes on tiny runs: started, watched, killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import tiny

from experiments.runner import run
from fedmm.config.load import dump_config

ROOT = Path(__file__).parents[2]
METHODS = ("fedavg", "fedcmi", "cmsfed")


def settings(method, **more):
    """A tiny run with uni-modal clients and final probes, so that every kind of message is sent."""
    return tiny.config(method, scenario__modalities__multimodal=0.7, evaluate__probe=True, **more)


def undisturbed(path, config):
    """Summary of the run in this process that nothing happens to."""
    return run(config, path)


def start(config, out, *options, **environment):
    """`fedmm run` in a session of its own, with more environment variables; its configuration lies beside `out`."""
    file = out.with_suffix(".yaml")
    file.write_text(dump_config(config))
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", "run", str(file), "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, code=0):
    """Wait for its end; what it printed."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def kill(process):
    """SIGKILL to all of its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def wait_for(process, condition, seconds=90):
    """Wait for something to become true while a process runs, and return it."""
    limit = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < limit:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    assert found
    return found


def checkpoint(out, round):
    """Whether a run has got this far."""
    return lambda: any(int(p.stem[6:]) >= round for p in (out / "checkpoints").glob("round-*.json"))


def mapped(process, name):
    """Whether a process has loaded a library."""
    try:
        return name in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


def result(out):
    """All of a run's result that must not depend on what happened to it."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"], summary["engine"]
    return summary, (out / "metrics.jsonl").read_text()


def living(session):
    """Process id -> command of the living processes of a session."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(its_session) == session:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").strip("\0 ")
    return found


def ray_files(process, seconds=5):
    """What is left, after a while, of the files of the Ray that a process has started."""

    def there():
        found = []
        for home in Path("/tmp").glob("fedmm-ray-*"):
            with suppress(FileNotFoundError):  # another one, which is just being removed
                found += home.glob(f"session_*_{process.pid}")
        return found

    limit = time.monotonic() + seconds
    while there() and time.monotonic() < limit:
        time.sleep(0.1)
    return there()


def left(session, seconds=30):
    """What is still alive of a session after a while."""
    limit = time.monotonic() + seconds
    while living(session) and time.monotonic() < limit:
        time.sleep(0.1)
    return living(session)
