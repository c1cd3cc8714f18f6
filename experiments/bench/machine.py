"""What the benchmark ran on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

SAME = ("processor", "vectors", "cores", "memory_gib", "accelerator", "versions", "code")
"""Of `describe`: what must be the same for two measurements to stand in one table."""

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "fedmm",
    "clients",
    "server",
    "experiments/runner.py",
    *(
        f"experiments/bench/{name}.py"
        for name in ("bare", "contestant", "launch", "pfl_app", "plain", "stopwatch", "workloads")
    ),
)
"""What runs while something is timed."""

PACKAGES = ("fedmm", "torch", "flwr", "ray", "numpy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, versions, code, and the time."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "load_before": os.getloadavg()[0],
        "code": code(),
        "commit": _commit(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code() -> str:
    """Twelve digits of the SHA-256 of the source files that run while something is timed."""
    digest = hashlib.sha256()
    for place in CODE:
        for path in sorted((ROOT / place).rglob("*.py")) if (ROOT / place).is_dir() else [ROOT / place]:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of the working tree, "+" if files differ from it; None without git."""
    with suppress(OSError, subprocess.SubprocessError):
        told = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return told[0].strip() + ("+" if told[1].strip() else "")
    return None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    with suppress(OSError):
        fields: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        name = fields.get("model name", "")
        return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
    return platform.processor()


def _memory_gib() -> float | None:
    with suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
