"""The engine of Flower itself: `flwr run` in simulation, against a SuperLink of our own that ends with the run.

Three habits of Flower 1.41 shape this module: `flwr run` exits with 0 even if the run failed, so the status is
asked for; a SuperLink installs the app's dependencies before each run unless it is told not to; and Ray actors
import from the SuperLink's working directory before the app bundle, so that directory is empty.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedmm.engines.processes import kill_tree
from fedmm.errors import RunError

BUNDLED_SUFFIXES = {".py", ".json", ".md", ".yaml", ".toml"}
START_SECONDS = 60.0
PENDING_SECONDS = 120.0
CHECK_SECONDS = 15.0
TAIL_LINES = 15
UNKNOWN = "unknown"
"""Status of a run of which Flower tells none."""

ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # One thread in every actor, as on our own workers: sums split over threads round differently.
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
}

PYPROJECT = """\
[project]
name = "fedmm-run"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedmm"

[tool.flwr.app.components]
serverapp = {server}
clientapp = {client}

[tool.flwr.app.config]
{config}
"""

CONFIG = """\
[superlink]
default = "private"

[superlink.private]
address = "127.0.0.1:{port}"
insecure = true
"""


def run_flower(
    server_app: str,
    client_app: str,
    run_config: Mapping[str, str | int | float | bool],
    *,
    nodes: int,
    workers: int,
    log: Path,
    on_line: Callable[[str], None] | None = None,
    timeout: float | None = None,
) -> None:
    """Run a pair of apps in Flower's simulation and return when the run is completed.

    Nothing is left behind: no process, also after Ctrl-C or when this process is killed, and no file but `log`.

    Args:
        server_app: Import path "package.module:attribute" of the ServerApp.
        client_app: The same of the ClientApp.
        run_config: What both apps see as `context.run_config`. File names in it must be absolute.
        nodes: Number of SuperNodes.
        workers: Number of Ray actors, of one CPU each.
        log: File that Flower's whole output is appended to.
        on_line: Called with each line of the run's log.
        timeout: Seconds for the whole run; None for no limit.

    Raises:
        RunError: The run did not start, did not end in time, or ended otherwise than completed.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    log.parent.mkdir(parents=True, exist_ok=True)
    # Ray's socket paths, inside, must stay below 108 bytes, which a long TMPDIR would exceed.
    home = Path(tempfile.mkdtemp(prefix="fedmm-flwr-", dir="/tmp" if os.path.isdir("/tmp") else None))
    try:
        port = _free_port()
        app = stage_app(home / "fedmm-run", server_app, client_app, run_config)
        (home / "flwr").mkdir()
        (home / "flwr" / "config.toml").write_text(CONFIG.format(port=port))
        environment = _environment(home)
        with log.open("ab") as output, _superlink(home, port, environment, output):
            size = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={workers}"
            command = [_tool("flwr"), "run", str(app), "private", "--stream", "--federation-config", size]
            tail = _follow(command, environment, output, on_line, deadline, log)
            status, details = _status(environment)
        if status != "finished:completed":
            last = tail[-1] if tail else ""
            raise RunError(f"Flower's run is {status}: {details or last}", where=str(log))
    finally:
        shutil.rmtree(home, ignore_errors=True)


def stage_app(
    target: Path, server_app: str, client_app: str, run_config: Mapping[str, str | int | float | bool]
) -> Path:
    """Write an app directory that Flower can bundle: the apps' packages, this one, and a pyproject with `run_config`.

    Works from a checkout and from an installed wheel alike, and keeps everything else out of the bundle.

    Raises:
        RunError: A package cannot be found.
    """
    target.mkdir(parents=True)
    for package in dict.fromkeys([path.split(":")[0].split(".")[0] for path in (server_app, client_app)] + ["fedmm"]):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RunError("no such package", where=package)
        if spec.submodule_search_locations:
            shutil.copytree(spec.submodule_search_locations[0], target / package, ignore=_not_bundled)
        else:
            shutil.copy(spec.origin, target)
    config = "\n".join(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in run_config.items())
    text = PYPROJECT.format(server=json.dumps(server_app), client=json.dumps(client_app), config=config)
    (target / "pyproject.toml").write_text(text, encoding="utf-8")
    return target


def _not_bundled(directory: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name == "__pycache__" or (Path(name).suffix not in BUNDLED_SUFFIXES and not Path(directory, name).is_dir())
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tool(name: str) -> str:
    found = shutil.which(name, path=_tool_path())
    if found is None:
        raise RunError(f"the program {name} is missing", remedy="install flwr into this environment")
    return found


def _tool_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: Path) -> dict[str, str]:
    (home / "r").mkdir()
    path = dict.fromkeys(str(Path(entry).resolve()) for entry in sys.path if Path(entry).is_dir())
    own = {"FLWR_HOME": str(home / "flwr"), "RAY_TMPDIR": str(home / "r"), "PATH": _tool_path()}
    return {**os.environ, **ENVIRONMENT, **own, "PYTHONPATH": os.pathsep.join(path)}


@contextmanager
def _superlink(home: Path, port: int, environment: dict[str, str], output: IO[bytes]) -> Iterator[None]:
    """Run a SuperLink in an empty directory until the block ends."""
    empty = home / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "fedmm.engines.superlink", str(os.getpid()), str(home)]
    command += ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=empty,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_for_port(process, port)
        yield
    finally:
        _end(process)


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RunError(f"Flower's SuperLink ended at once with code {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RunError(f"Flower's SuperLink did not start within {START_SECONDS:.0f} s")


def _follow(
    command: list[str],
    environment: dict[str, str],
    output: IO[bytes],
    on_line: Callable[[str], None] | None,
    deadline: float | None,
    log: Path,
) -> deque[str]:
    """Run `flwr run --stream` to its end, hand over its lines, and return the last of them."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    started, running = time.monotonic(), False
    try:
        while True:
            wait = CHECK_SECONDS if deadline is None else min(CHECK_SECONDS, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(0.0, wait))
            except queue.Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise RunError("Flower's run did not end in time", where=str(log)) from None
                # Flower is known to leave a run pending for ever now and then.
                running = running or _status(environment)[0] not in ("pending", "starting", UNKNOWN)
                if not running and time.monotonic() - started > PENDING_SECONDS:
                    raise RunError("Flower never started the run", where=str(log), remedy="try again") from None
                continue
            if line is None:
                break
            output.write(line.encode())
            output.flush()
            tail.append(line.rstrip())
            if on_line is not None:
                on_line(line.rstrip())
    finally:
        _end(process)
    if process.returncode:
        reason = " ".join(line.strip() for line in tail if line.strip())
        raise RunError(f"flwr run failed: {reason}", where=str(log))
    return tail


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.wait()
    lines.put(None)


def _status(environment: dict[str, str]) -> tuple[str, str]:
    """Status of the only run of the private SuperLink, and its details."""
    command = [_tool("flwr"), "list", "private", "--format", "json"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        return UNKNOWN, f"no answer within {START_SECONDS:.0f} s"
    try:
        (run,) = json.loads(done.stdout)["runs"]
    except (ValueError, KeyError) as error:
        raise RunError(f"cannot read the status of Flower's run: {done.stdout}{done.stderr}") from error
    return run["status"], run.get("status-details", "")


def _end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    # The id of a process that has been waited for may belong to another one by now.
    if process.poll() is None:
        kill_tree(process.pid)
        process.wait()
