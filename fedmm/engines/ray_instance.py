"""The private Ray instance of this process: started by the first pool, stopped after the last."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.ray_logging import stdout_deduplicator

import fedmm
from fedmm.errors import RunError

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
EVERYTHING = re.compile("")
SKIPPED_BEFORE = stdout_deduplicator.skip_re


@dataclass
class _Instance:
    users: int = 0
    directory: str | None = None


_instance = _Instance()


def acquire(workers: int) -> None:
    """Start Ray for `workers` processes, or join the instance that already runs in this process.

    Raises:
        RunError: Ray does not start.
    """
    if not ray.is_initialized():
        # Ray's socket paths must stay below 108 bytes, which a long TMPDIR would exceed.
        _instance.directory = tempfile.mkdtemp(prefix="fedmm-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
        # Ray prints a notice of each dead worker on standard output, which belongs to our caller.
        stdout_deduplicator.skip_re = EVERYTHING
        try:
            with _environment():
                ray.init(
                    address="local",
                    num_cpus=workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=_instance.directory,
                )
        except Exception as error:
            _stop()
            raise RunError(f"Ray does not start: {error}", remedy="use the engine inproc") from error
    _instance.users += 1


def release() -> None:
    """Give up one use; after the last one, stop the instance if we started it."""
    _instance.users -= 1
    if _instance.users == 0 and _instance.directory is not None:
        _stop()


def _stop() -> None:
    ray.shutdown()
    stdout_deduplicator.skip_re = SKIPPED_BEFORE
    if _instance.directory is not None:
        shutil.rmtree(_instance.directory, ignore_errors=True)
    _instance.directory = None


@contextmanager
def _environment() -> Iterator[None]:
    """Set what Ray's processes inherit: our settings, and where to import this package from."""
    here = str(Path(fedmm.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    settings = {**ENVIRONMENT, "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
