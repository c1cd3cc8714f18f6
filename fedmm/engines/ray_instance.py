"""The private Ray instance of this process: started in the background, stopped after the last pool.

Of what Ray starts on one machine only its control store, its node manager and the workers are of use here. Dashboard,
autoscaler and log monitor, a Python process each, are left out: they would take a third of the start-up.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_logging import stdout_deduplicator

import fedmm
from fedmm.engines import private_folder
from fedmm.engines.processes import descendants, kill_tree
from fedmm.errors import FedmmError, RunError

# Private parts of Ray, which no type describes.
parameter: Any = importlib.import_module("ray._private.parameter")
services: Any = importlib.import_module("ray._private.services")
# An older release, whose node manager waits for no agent, has none.
persist_port: Any = getattr(importlib.import_module("ray._raylet"), "persist_port", None)

START_SECONDS = 40.0
INPROC = "engine=inproc needs no Ray"
RESUME = "the same command with --resume goes on after the last checkpoint"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A worker that is killed while it starts is missed only after this time (default 60 s).
    "RAY_worker_register_timeout_seconds": "25",
    # After a kill of this process, Ray's agents look for its control store that long (default 60 s).
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}
PRESTARTED = "--num_prestart_python_workers=0"
AGENT = re.compile("--(dashboard|runtime_env)_agent_command=")
_Start = Callable[..., Any]
EVERYTHING = re.compile("")
SKIPPED_BEFORE = stdout_deduplicator.skip_re


class _Keeper(threading.Thread):
    """Starts Ray, and stays: Linux ends Ray's processes together with the thread that started them.

    Attributes:
        directory: Ray's files.
        ready: Set when Ray runs, or failed to start.
        over: To be set when Ray has been stopped.
        error: Why it failed.
    """

    def __init__(self, workers: int, modules: Sequence[str]) -> None:
        super().__init__(name="fedmm-ray", daemon=True)
        # Ray's socket paths must stay below 108 bytes, which a long TMPDIR would exceed.
        short = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
        self.directory = private_folder.claim("fedmm-ray-", short)
        self.ready, self.over = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self._workers, self._modules = workers, list(modules)

    def run(self) -> None:
        """Start Ray and wait for its end."""
        try:
            with _few_processes():
                ray.init(
                    address="local",
                    num_cpus=self._workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=self.directory,
                    _metrics_export_port=free_ports(1)[0],
                    # Workers import these before they take work.
                    _system_config={"preload_python_modules": self._modules},
                )
        except BaseException as error:
            self.error = error
        self.ready.set()
        self.over.wait()


@dataclass
class _Instance:
    users: int = 0
    keeper: _Keeper | None = None
    directory: str | None = None  # until it is removed, which is after the keeper is given up
    abandoned: bool = False


_instance = _Instance()


def begin(workers: int, modules: Sequence[str] = ()) -> None:
    """Start Ray for `workers` processes in the background, unless an instance runs in this process.

    Args:
        workers: Number of worker processes.
        modules: What workers import before they are asked for anything.
    """
    if _instance.keeper is not None or ray.is_initialized():
        return
    # Ray prints a notice of each dead worker on standard output, which belongs to our caller.
    stdout_deduplicator.skip_re = EVERYTHING
    # Here too, or it warns of a change to come.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _instance.keeper = _Keeper(workers, modules)
    _instance.directory = _instance.keeper.directory
    atexit.register(_stop)
    _instance.keeper.start()


def acquire(workers: int, modules: Sequence[str] = ()) -> None:
    """Begin (see `begin`), and hold the instance until `release`."""
    begin(workers, modules)
    _instance.users += 1


def ready() -> bool:
    """Whether `connect` need not wait."""
    return _instance.keeper is None or (_instance.keeper.ready.is_set() and _instance.keeper.error is None)


def private() -> bool:
    """Whether the instance is ours, with all its workers on this machine."""
    return _instance.keeper is not None


def connect() -> None:
    """Wait until Ray runs.

    Raises:
        RunError: It does not start.
    """
    keeper = _instance.keeper
    if keeper is None:
        return
    if not keeper.ready.wait(START_SECONDS):
        abandon()
        raise RunError(f"Ray does not start within {START_SECONDS:.0f} s", remedy=f"free memory; {INPROC}")
    if keeper.error is not None:
        abandon()
        reason = " ".join(str(keeper.error).split())[:300]
        raise RunError(f"Ray does not start: {reason}", remedy=INPROC) from keeper.error


def release() -> None:
    """Give up one use; after the last one, stop the instance if we started it."""
    _instance.users -= 1
    if _instance.users == 0:
        _stop()


def ended() -> str | None:
    """Which of Ray's own processes has ended, and how; None if all is well."""
    node: Any = getattr(ray._private.worker, "_global_node", None)
    if _instance.keeper is None or node is None:
        return None
    for kind, infos in list(node.all_processes.items()):
        code = infos[0].process.poll()
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"Ray's {kind} {how}"
    return None


@contextmanager
def watched() -> Iterator[None]:
    """Errors that arise because Ray itself has ended become a `RunError`."""
    try:
        yield
    except FedmmError:
        raise
    except Exception:
        check()
        raise


def check() -> None:
    """Make sure that Ray runs.

    Raises:
        RunError: It has ended.
    """
    if reason := ended():
        raise RunError(reason, remedy=RESUME)


def private_directory() -> str | None:
    """Where an instance that we started keeps its files, also while it is being stopped; None: there are none."""
    return _instance.directory


def abandoned() -> bool:
    """Whether an instance was abandoned."""
    return _instance.abandoned


def abandon() -> None:
    """End whatever there is of an instance that we started, without asking it.

    This process keeps a connection to what is no more; Ray's own exit handler then waits five seconds.
    """
    keeper, _instance.keeper = _instance.keeper, None
    if keeper is None:
        return
    atexit.unregister(_stop)
    _instance.abandoned = True
    for pid in descendants(os.getpid()) - {os.getpid()}:
        with suppress(OSError):
            if keeper.directory in Path(f"/proc/{pid}/cmdline").read_text():
                kill_tree(pid)
    _clear(keeper)


def _stop() -> None:
    if _instance.keeper is not None and (not _instance.keeper.ready.is_set() or ended()):
        abandon()
    elif _instance.keeper is not None:
        keeper, _instance.keeper = _instance.keeper, None
        atexit.unregister(_stop)
        ray.shutdown()
        _clear(keeper)


def _clear(keeper: _Keeper) -> None:
    stdout_deduplicator.skip_re = SKIPPED_BEFORE
    keeper.over.set()
    private_folder.remove(keeper.directory)
    _instance.directory = None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _few_processes() -> Iterator[None]:
    """Inside, Ray starts no more than it needs, and its workers inherit our settings and find this package."""
    here = str(Path(fedmm.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    names = "metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port"
    ports = dict(zip(names, free_ports(3), strict=True))
    settings = {"no_monitor": True, "include_log_monitor": False, "env_vars": {**ENVIRONMENT, "PYTHONPATH": path}}
    before = parameter.RayParams, services.start_api_server, services.start_ray_process
    parameter.RayParams = partial(parameter.RayParams, **settings, **(ports if persist_port else {}))
    services.start_api_server = lambda *_, **__: (None, None)
    if persist_port:
        services.start_ray_process = partial(_without_agents, before[2], ports["dashboard_agent_listen_port"])
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server, services.start_ray_process = before


def _without_agents(
    start: Callable[..., Any], port: int, command: list[str], kind: str, *rest: Any, **more: Any
) -> Any:
    """Start a process of Ray's; a node manager with stand-ins for its agents."""
    if kind == "raylet":
        given = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
        # It would wait for the agent to tell this port.
        persist_port(given["session_dir"], given["node_id"], "dashboard_agent_listen_port", port)
        line = subprocess.list2cmdline([sys.executable, "-S", str(Path(__file__).with_name("stand_in.py"))])
        # Connecting would wait for these, and this whole process with it.
        command = [PRESTARTED if word.startswith(PRESTARTED[:-1]) else word for word in command]
        command = [f"{found[0]}{line}" if (found := AGENT.match(word)) else word for word in command]
    return start(command, kind, *rest, **more)
