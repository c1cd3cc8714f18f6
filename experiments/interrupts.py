"""Ctrl-C at any moment: one message, exit code 6, soon, and nothing left running.

Until something is begun the program just leaves. While a run is under way (`tidy`) Ctrl-C is a `KeyboardInterrupt`,
so that the run can record how it ended; if that takes too long, or the user insists, the program leaves all the same.
SIGTERM, which batch systems send, is the same. Only the standard library is imported before this is in force.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

CODE = 6
PATIENCE_S = 3.5


class _State:
    program = 0
    tidying = 0
    asked = False
    leaving = False


_state = _State()


def install() -> None:
    """Put this in force in the program; a library leaves signals alone."""
    _state.program = os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)
    sys.unraisablehook = _insist


@contextmanager
def program() -> Iterator[None]:
    """The life of the program: Ctrl-C in force, and a quick end where libraries cannot end well."""
    install()
    try:
        yield
    except SystemExit as end:
        if _state.asked:
            # Python is about to give signals back to the system, which would end it with another code.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        ray = sys.modules.get("fedmm.engines.ray_instance")
        if ray is not None and ray.abandoned():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def asked() -> bool:
    """Whether the user wants the program to end."""
    return _state.asked


@contextmanager
def tidy() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt`, so that what was begun can be brought to an end."""
    _state.tidying += 1
    try:
        yield
    finally:
        _state.tidying -= 1


def leave(message: str = "interrupted") -> NoReturn:
    """End this program now, with all processes below it."""
    _state.leaving = True
    below: set[int] = set()
    with suppress(Exception):
        # Not before it is needed, nor half imported.
        from fedmm.engines.processes import descendants

        below = descendants(os.getpid()) - {os.getpid()}
    ray = sys.modules.get("fedmm.engines.ray_instance")
    directory = None if ray is None else ray.private_directory()
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        message = f"\x1b[?25h\r\x1b[K{message}"  # a progress bar hides the cursor
    with suppress(OSError):
        os.write(2, f"fedmm: {message}\n".encode())
    # Once its first process is dead, Ray's thread waits half a minute for it and holds the interpreter's lock: from
    # here on nothing may give that up.
    sys.setswitchinterval(3600)
    # Whatever goes wrong in a program that may already be closing down, it ends here.
    try:
        me = os.getpid()
        if directory is not None and os.fork() == 0:
            _sweep(me, directory)
        for pid in below:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    finally:
        os._exit(CODE)


def _sweep(parent: int, directory: str) -> NoReturn:
    """In a process of its own: once the program is gone, end what it had just started, and remove Ray's files."""
    with suppress(Exception):
        os.setsid()
        for stream in range(3):
            os.close(stream)
        while os.getppid() == parent:
            time.sleep(0.01)
        # A process that was being started shows its own command a little later.
        for _ in range(20):
            for entry in os.scandir("/proc") if os.path.isdir("/proc/self") else ():
                with suppress(OSError, ValueError):
                    with open(f"/proc/{entry.name}/cmdline") as command:
                        ours = directory in command.read()
                    if ours:
                        os.kill(int(entry.name), signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.program:
        # A process that is just being started, Ray's for one: whoever starts it waits for it, and ends it.
        return
    if _state.leaving:
        return
    if not _state.tidying or _state.asked:
        leave()
    _state.asked = True
    timer = threading.Timer(PATIENCE_S, leave, ("interrupted (--resume goes on after the last checkpoint)",))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _insist(what: Any) -> None:
    """An interrupt that arrives in a finaliser is swallowed there: send it again, a little later."""
    if not isinstance(what.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(what)
        return
    _state.asked = False
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
