"""Flower's SuperLink as a program that ends with its parent: `python -m fedmm.engines.superlink PARENT HOME ARGS...`.

PARENT is the process id of the launcher, HOME the run's temporary directory. When a launcher is killed it can
clean up nothing itself, and a simulation does not end with its SuperLink, so this does it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time

from flwr.superlink.cli import flower_superlink

from fedmm.engines.processes import kill_tree


def main() -> None:
    """Run the SuperLink until it ends by itself or its parent is gone."""
    parent, home = int(sys.argv.pop(1)), sys.argv.pop(1)
    threading.Thread(target=_watch, args=(parent, home), daemon=True).start()
    flower_superlink()


def _watch(parent: int, home: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(home, ignore_errors=True)
    kill_tree(os.getpid())


if __name__ == "__main__":
    main()
