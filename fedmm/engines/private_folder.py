"""Folders of one process, which later ones find to be nobody's and remove if it had no time to."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_OWNER = "owner.lock"
"""A file in each folder that its process holds locked; the system lets go of it even if the process is killed."""

_held: dict[str, int] = {}


def claim(prefix: str, parent: str) -> str:
    """Make a folder of this process in `parent`, and remove those with the same prefix whose processes are gone."""
    for lock in Path(parent).glob(f"{prefix}*/{_OWNER}"):
        _remove_if_orphaned(lock)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    fresh = Path(folder, f"{_OWNER}.new")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    fresh.rename(Path(folder, _OWNER))  # only now do others look at it
    _held[folder] = descriptor
    return folder


def remove(folder: str) -> None:
    """Remove a folder that this process claimed."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(_held.pop(folder))


def _remove_if_orphaned(lock: Path) -> None:
    with suppress(OSError):  # somebody else's, or removed meanwhile
        descriptor = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(descriptor)
