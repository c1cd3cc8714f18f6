"""What runs in a Ray worker: one process that does jobs, and answers messages when it must.

Kept light, for a worker that dies is replaced in mid-round: it loads the crew, and Flower with the client app only when
the first message comes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import ObjectRef

from fedmm.engines.lines import Line, Paths
from fedmm.engines.memory import Memory, Packed, pack, unpack
from fedmm.engines.work import attempt_job, load_callable

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Metadata

    from fedmm.engines.grid import App, Outcome, Record, Task


@dataclass(frozen=True)
class Parcel:
    """A task as it travels: a shared array record is replaced by its key."""

    metadata: Metadata
    records: dict[str, Record | str]
    context: Context

    def unpack(self, shared: dict[str, ArrayRecord]) -> Task:
        """The task, with `shared` (key -> record) put in."""
        from fedmm.engines.grid import Task, message_from

        records = {name: shared[r] if isinstance(r, str) else r for name, r in self.records.items()}
        return Task(message_from(self.metadata, records), self.context)


class Worker:
    """The Ray actor: one process that has loaded the client app."""

    def __init__(self) -> None:
        # Ctrl-C reaches the whole process group, but only the driver decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        self._app: App | None = None
        self._path = ""
        self._shared: dict[str, ArrayRecord] = {}
        self._common: tuple[int, Any] = (0, None)
        self._inbox: Memory | None = None
        self._memory: Memory | None = None
        self._line: Line | None = None
        self._do: Callable[[Any, Any], Any]

    def greet(
        self, app: str, path: list[str], crew: str | None = None, link: tuple[str, str, Paths] | None = None
    ) -> int:
        """Load the crew, or the app if there is none, with the driver's `sys.path`; return the process id.

        Args:
            app: Import path of the client app.
            path: The driver's `sys.path`.
            crew: Import path of the function that does jobs.
            link: Where to find the memory for what all workers get, and memory and line for what goes to and fro here.
        """
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
        self._path = app
        if crew is None:
            self._app = load_callable(app, "client app")
        else:
            self._do = load_callable(crew, "crew")
        if link is not None:
            self._inbox, self._memory, self._line = Memory(link[0]), Memory(link[1]), Line.at(link[2])
            self._line.send(None)
        return os.getpid()

    def serve(self) -> None:
        """Do the jobs that come over the line, until None comes."""
        assert self._line is not None
        try:
            while (order := self._order()) is not None:
                self._line.send(self.run_jobs(*order))
        except BaseException:
            # The driver sees the line's end, and asks Ray for the reason.
            self._line.close()
            raise

    def _order(self) -> Any:
        try:
            return self._line.receive() if self._line else None
        except EOFError:  # the driver has ended, and Ray will end us
            return None

    def run_jobs(self, jobs: Packed, number: int, common: Packed) -> Packed:
        """Do jobs one by one; give back the index of each, the part that was done instead if it is one, and the result.

        Args:
            jobs: What to do.
            number: Of the order that they belong to.
            common: What all jobs of this order share.
        """
        if number != self._common[0]:
            self._common = number, unpack(common, self._inbox)
        outcomes = []
        # Copies: what is given back takes their place.
        for i, job in enumerate(unpack(jobs, self._memory, copy=True)):
            done = attempt_job(self._do, job, self._common[1])
            outcomes += [(i, None if part is job else part, result) for part, result in done]
        return pack(outcomes, self._memory)

    def run(self, parcels: list[Parcel], refs: dict[str, ObjectRef[Any]]) -> list[Outcome]:
        """Handle parcels one by one. `refs`: key -> reference to a shared record, fetched if it is new."""
        from fedmm.engines.grid import call_app

        app = self._app = self._app or load_callable(self._path, "client app")
        self._shared = {k: self._shared[k] if k in self._shared else ray.get(ref) for k, ref in refs.items()}
        return [call_app(app, parcel.unpack(self._shared)) for parcel in parcels]
