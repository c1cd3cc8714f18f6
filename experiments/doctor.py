"""What `fedmm doctor` looks at: whether this machine can run an experiment, and what to do if not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement

from fedmm.errors import FedmmError

MIN_DISK_GB, MIN_MEMORY_GB = 1.0, 2.0


@dataclass(frozen=True)
class Finding:
    """One thing that was checked; `remedy` says what to do when it is not good."""

    check: str
    result: str
    good: bool = True
    remedy: str = ""


def examine() -> list[Finding]:
    """Run every check."""
    return [finding for check in CHECKS for finding in check()]


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    yield Finding("python", f"{platform.python_version()} on {platform.machine()}", good, "use Python 3.11 or newer")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for, the range of Flower's versions above all."""
    try:
        lines = importlib.metadata.requires("fedmm") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("fedmm", "not installed", False, "pip install -e .")
        return
    yield Finding("fedmm", importlib.metadata.version("fedmm"))
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", False, f"pip install '{wanted}'")
            continue
        good = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version, good, f"pip install '{wanted}'")


def _torch() -> Iterator[Finding]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    yield Finding("compute", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {gpu}")


def _kernels() -> Iterator[Finding]:
    """Without them everything works, several times as slowly."""
    from fedmm import native

    used = native.instructions()
    off = "FEDMM_KERNELS is off" if os.environ.get("FEDMM_KERNELS") else "install a C compiler and reinstall fedmm"
    yield Finding("compiled kernels", f"with {used} instructions" if used else f"none, hence slower: {off}")


def _ray() -> Iterator[Finding]:
    from fedmm.engines import ray_instance

    try:
        ray_instance.acquire(1)
        try:
            ray_instance.connect()
        finally:
            ray_instance.release()
    except (FedmmError, OSError, RuntimeError) as error:
        yield Finding("ray", f"does not start: {error}", False, "engine=inproc needs no Ray; free memory or /dev/shm")
        return
    yield Finding("ray", "starts")


def _data() -> Iterator[Finding]:
    from fedmm.data import container

    folder = Path(str(files("fedmm.data"))) / "embedded"
    for path in sorted(folder.glob("*.json")):
        try:
            container.read(path)
        except FedmmError as error:
            yield Finding(f"data {path.stem}", error.what, False, error.remedy or "reinstall fedmm")
            continue
        yield Finding(f"data {path.stem}", f"hash as recorded, {path.stat().st_size / 1e6:.1f} MB")


def _space() -> Iterator[Finding]:
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("disk", f"{disk:.1f} GB free here", disk >= MIN_DISK_GB, f"runs want {MIN_DISK_GB:g} GB or more")
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    yield Finding("memory", f"{memory:.1f} GB free", memory >= MIN_MEMORY_GB, "lower engine.workers")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _packages, _torch, _kernels, _ray, _data, _space)
