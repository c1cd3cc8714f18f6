"""The engine on Ray: persistent workers that are handed chunks of messages, and are replaced when they die.

A reply is a pure function of (message, context), and a job's result of (job, what all share), so neither the number
of workers nor the chunks they are handed can change a bit of it. What several messages share is put into Ray's object
store once a round and is fetched once by each worker; jobs for workers on this machine travel faster
(`fedmm.engines.lines`, `fedmm.engines.memory`).
"""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from flwr.app import ArrayRecord
from ray import ObjectRef
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from fedmm.engines import ray_instance
from fedmm.engines.chunks import DEATHS_BEFORE_ALONE, DEATHS_BEFORE_ERROR, Chunk, after_death, guided
from fedmm.engines.grid import LocalGrid, Outcome, Record, RunConfig, Task
from fedmm.engines.lines import Line
from fedmm.engines.memory import Memory, new_memory, pack, unpack
from fedmm.engines.processes import is_alive
from fedmm.engines.ray_link import Link
from fedmm.engines.ray_worker import Parcel, Worker
from fedmm.engines.work import LostJob, parts_of
from fedmm.errors import RunError

CHUNKS_PER_WORKER = 4
START_SECONDS = 35.0
FAILED_STARTS = 5
WATCH_SECONDS = 0.5
CANNOT_START = f"is there memory for engine.workers? {ray_instance.INPROC}"

DEATH = (RayActorError, OutOfMemoryError, TaskCancelledError, WorkerCrashedError, GetTimeoutError)


class RayPool:
    """Ray workers that serve any number of grids, one after another; a context manager.

    Starts a private Ray instance unless one runs in this process. Returns at once: Ray starts in the background, and
    `wait` or the first message waits for it and for the workers.

    Args:
        app: Import path "package.module:attribute" of the client app.
        workers: Number of worker processes, whatever the number of cores.
        crew: Import path of the function that does jobs (see `WorkingGrid`).

    Raises:
        RunError: No workers are asked for.
    """

    def __init__(self, app: str, workers: int, crew: str | None = None) -> None:
        if workers < 1:
            raise RunError(f"{workers} workers", remedy="use at least one")
        self._app = app
        self.crew = crew
        self._path = [str(Path(entry).resolve()) for entry in sys.path]
        self._idle: list[Any] = []
        self._greeted: dict[ObjectRef[Any], tuple[Any, float]] = {}
        self._busy: dict[ObjectRef[Any] | Link, tuple[Any, Chunk]] = {}
        self._failed_starts = 0
        self._death = ""
        self._hope = 0.0
        self._seen_alive: set[Any] = set()
        self._pids: dict[Any, int] = {}
        self._links: dict[Any, Link] = {}
        self._orders = 0
        self._opened = self._closed = False
        self.workers = workers
        self.shared_records = 0
        self.deaths = 0
        ray_instance.acquire(workers, modules_of(crew))
        # Workers of a Ray that is not ours may be on other machines.
        self._common = new_memory() if ray_instance.private() else None
        atexit.register(self.close)
        if ray_instance.ready():
            self._open()

    def wait(self, workers: int = 1) -> None:
        """Wait until this many workers are ready.

        Raises:
            RunError: Ray does not start or has ended, a worker cannot load the app, or none starts in time.
        """
        with ray_instance.watched():
            self._open()
            for worker in [w for w in self._idle if ray_instance.private() and not is_alive(self._pids[w])]:
                self._idle.remove(worker)
                self.deaths += 1
                self._replace(worker)
            while len(self._idle) < workers:
                self._next_event(None)

    def _open(self) -> None:
        """Have all workers start, if that was not done."""
        if self._opened:
            return
        ray_instance.connect()
        self._opened = True
        self._hope = time.monotonic() + START_SECONDS
        for _ in range(self.workers):
            self._start()

    def run(self, tasks: Sequence[Task], timeout: float | None = None) -> Iterator[tuple[int, Outcome]]:
        """Yield (index of the task, outcome) as chunks are done; stop `timeout` seconds after a worker is ready.

        The chunk of a worker that dies is run again, then its tasks one by one; a task whose fourth worker dies
        gets an error reply. What is unfinished when the iterator is closed is killed with its worker.

        Raises:
            RunError: No worker can be started, Ray has ended, or the pool is closed.
        """
        self._ready()
        with ray_instance.watched():
            parcels, refs = self._pack(tasks)

        def submit(worker: Any, chunk: Chunk) -> ObjectRef[Any]:
            if link := self._links.get(worker):
                link.pause()
            mine = [parcels[i] for i in chunk.indices]
            keys = {r for parcel in mine for r in parcel.records.values() if isinstance(r, str)}
            return worker.run.remote(mine, {key: refs[key] for key in keys})  # type: ignore[no-any-return]

        size = max(1, math.ceil(len(tasks) / (CHUNKS_PER_WORKER * self.workers)))
        order = range(len(tasks))
        queue = deque(Chunk(tuple(order[i : i + size])) for i in range(0, len(tasks), size))
        for chunk, outcomes, error in self._dispatch(queue, submit, lambda _, __, reply: reply, timeout):
            if error is not None:
                again, outcomes = after_death(chunk, tasks, error)
                queue.extendleft(again)
            yield from zip(chunk.indices, outcomes, strict=False)

    def work(self, jobs: Sequence[Any], shared: Any, timeout: float | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield (job, result) as jobs are done; arguments and deaths as for `run` (see `WorkingGrid.work`)."""
        self._ready()
        self._orders += 1
        number, common, todo = self._orders, pack(shared, self._common), list(jobs)

        def submit(worker: Any, chunk: Chunk) -> ObjectRef[Any] | Link:
            mine, link = [todo[i] for i in chunk.indices], self._links.get(worker)
            if link is not None:
                return link.order(worker, (link.memory.pack(mine), number, common))
            return worker.run_jobs.remote(pack(mine, None), number, common)  # type: ignore[no-any-return]

        def receive(worker: Any, chunk: Chunk, reply: Any) -> list[Any]:
            link = self._links.get(worker)
            done = unpack(reply, None if link is None else link.memory, copy=True)
            return [(todo[chunk.indices[i]] if part is None else part, result) for i, part, result in done]

        queue = deque(guided(len(todo), self.workers))
        for chunk, outcomes, error in self._dispatch(queue, submit, receive, timeout):
            if error is None:
                yield from outcomes
                continue
            chunk = replace(chunk, deaths=chunk.deaths + 1)
            if chunk.deaths < DEATHS_BEFORE_ALONE:
                queue.appendleft(chunk)
            elif chunk.deaths < DEATHS_BEFORE_ERROR:
                parts = [part for i in chunk.indices for part in parts_of(todo[i])]
                queue.extendleft(Chunk((len(todo) + i,), chunk.deaths) for i in reversed(range(len(parts))))
                todo += parts
            else:
                reason = f"{chunk.deaths} workers died of this job: {' '.join(str(error).split())[:300]}"
                yield from ((todo[i], LostJob(reason)) for i in chunk.indices)

    def _ready(self) -> None:
        """Wait for a worker."""
        if self._closed or self._busy:
            raise RunError("the Ray workers are shut down" if self._closed else "the Ray workers are busy")
        # Ray ends this process without a word when it finds its object store gone: look before each use of that.
        ray_instance.check()
        self._seen_alive = set()
        self.wait()

    def _dispatch(
        self,
        queue: deque[Chunk],
        submit: Callable[[Any, Chunk], ObjectRef[Any] | Link],
        receive: Callable[[Any, Chunk, Any], list[Any]],
        timeout: float | None,
    ) -> Iterator[tuple[Chunk, list[Any], Exception | None]]:
        """Hand out chunks to whoever is idle; yield each with its outcomes, or with the death of its worker."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with ray_instance.watched():
                while queue or self._busy:
                    while queue and self._idle:
                        worker = self._idle.pop()
                        try:
                            self._busy[submit(worker, queue[0])] = worker, queue[0]
                        except BrokenPipeError:  # it died while it was idle
                            self.deaths += 1
                            self._replace(worker)
                        else:
                            queue.popleft()
                    call = self._next_event(deadline)
                    if call is None:
                        if deadline is not None and time.monotonic() >= deadline:
                            return
                        continue
                    worker, chunk = self._busy.pop(call)
                    self._hope = time.monotonic() + START_SECONDS
                    ray_instance.check()
                    try:
                        reply = call.answer() if isinstance(call, Link) else ray.get(call)
                        outcomes = receive(worker, chunk, reply)
                    except DEATH as error:
                        self.deaths += 1
                        self._replace(worker)
                        if worker in self._seen_alive:
                            yield chunk, [], error
                        else:
                            # It may have died while it was idle: nobody is charged with that.
                            queue.appendleft(chunk)
                    except RayTaskError as error:
                        ray.kill(worker)
                        raise _not_loaded(error, self._app) from None
                    else:
                        self._idle.append(worker)
                        self._seen_alive.add(worker)
                        yield chunk, outcomes, None
        finally:
            while self._busy and not ray_instance.ended():
                self._replace(self._busy.popitem()[1][0])

    def close(self) -> None:
        """Stop the workers, and Ray itself after the last pool; may be called again."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        if not ray_instance.ended():
            for worker in [*self._idle, *(w for w, _ in self._greeted.values()), *(w for w, _ in self._busy.values())]:
                ray.kill(worker)
        self._idle, self._greeted, self._busy = [], {}, {}
        for link in self._links.values():
            link.close()
        if self._common is not None:
            self._common.close()
        self._links, self._common = {}, None
        ray_instance.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pack(self, tasks: Sequence[Task]) -> tuple[list[Parcel], dict[str, ObjectRef[Any]]]:
        uses = Counter(id(r) for task in tasks for r in task.message.content.values() if isinstance(r, ArrayRecord))
        keys: dict[int, str] = {}
        refs: dict[str, ObjectRef[Any]] = {}
        parcels = []
        for task in tasks:
            records: dict[str, Record | str] = {}
            for name, record in task.message.content.items():
                if uses[id(record)] < 2:
                    records[name] = record
                    continue
                if id(record) not in keys:
                    ref = ray.put(record)
                    keys[id(record)] = ref.hex()
                    refs[ref.hex()] = ref
                records[name] = keys[id(record)]
            parcels.append(Parcel(task.message.metadata, records, task.context))
        self.shared_records += len(refs)
        return parcels, refs

    def _start(self) -> None:
        worker: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(Worker).remote()
        paths = None
        if self._common is not None and self.crew is not None:
            link = self._links[worker] = Link(Memory(), Line())
            paths = self._common.path, link.memory.path, link.line.paths
        greeting = worker.greet.remote(self._app, self._path, self.crew, paths)
        self._greeted[greeting] = worker, time.monotonic() + START_SECONDS

    def _replace(self, worker: Any) -> None:
        ray.kill(worker)
        self._pids.pop(worker, None)
        if link := self._links.pop(worker, None):
            link.close()
        self._start()

    def _next_event(self, deadline: float | None) -> ObjectRef[Any] | Link | None:
        """Wait for a busy worker's answer and return its call; None: a greeting came back, or nothing for a while."""
        timeout = WATCH_SECONDS if deadline is None else min(WATCH_SECONDS, max(0.0, deadline - time.monotonic()))
        calls: list[ObjectRef[Any]] = [call for call in self._busy if not isinstance(call, Link)]
        if len(calls) < len(self._busy):
            # Who has been greeted says so on its line as well.
            lines = {call.line.fileno(): call for call in self._busy if isinstance(call, Link)}
            new = [self._links[worker].line.fileno() for worker, _ in self._greeted.values()]
            heard = connection.wait([*lines, *new], timeout)
            for line in heard:
                if line in lines:
                    return lines[line]
            timeout = timeout if heard else 0.0
        waiting = [*calls, *self._greeted]
        done, _ = ray.wait(waiting, num_returns=1, timeout=timeout) if waiting else ([], [])
        if done and done[0] in self._greeted:
            self._welcome(done[0])
            return None
        if done:
            return done[0]
        ray_instance.check()
        now = time.monotonic()
        if not (self._idle or self._busy) and self._hope <= now:
            died = f"; {self._failed_starts} died at start-up: {self._death}" if self._failed_starts else ""
            raise RunError(f"no Ray worker started within {START_SECONDS:.0f} s{died}", remedy=CANNOT_START)
        for ref, (worker, limit) in list(self._greeted.items()):
            if limit <= now:
                del self._greeted[ref]
                self._replace(worker)
        return None

    def _welcome(self, ref: ObjectRef[Any]) -> None:
        worker, _ = self._greeted.pop(ref)
        try:
            self._pids[worker] = ray.get(ref)
        except RayTaskError as error:
            ray.kill(worker)
            raise _not_loaded(error, self._app) from None
        except DEATH as error:
            ray_instance.check()
            self._failed_starts += 1
            self._death = " ".join(str(error).split())[:300]
            if self._failed_starts >= FAILED_STARTS * self.workers:
                what = f"{self._failed_starts} Ray workers in a row died at start-up: {self._death}"
                raise RunError(what, remedy=CANNOT_START) from None
            self._replace(worker)
        else:
            self._failed_starts, self._hope = 0, time.monotonic() + START_SECONDS
            if link := self._links.get(worker):
                link.line.taken()
                link.line.receive()
            self._idle.append(worker)
            self._seen_alive.add(worker)


def modules_of(crew: str | None) -> list[str]:
    """What workers import before they are asked for anything."""
    return [Worker.__module__, *([crew.partition(":")[0]] if crew else [])]


def _not_loaded(error: RayTaskError, app: str) -> RunError:
    """What a worker says that cannot load the app or the crew."""
    cause = error.cause if isinstance(error.cause, RunError) else RunError(str(error.cause), where=app)
    return RunError(f"a Ray worker failed to start: {cause.what}", where=cause.where, remedy="mend this module")


class RayGrid(LocalGrid):
    """A Flower grid whose clients run on a pool of Ray workers; closing the pool is its owner's business.

    Args:
        pool: The workers.
        clients: Number of SuperNodes.
        run_config: What clients see as `context.run_config`.
    """

    def __init__(self, pool: RayPool, clients: int, run_config: RunConfig | None = None) -> None:
        super().__init__(clients, run_config, pool.crew)
        self._pool = pool
        self.processes = pool.workers

    def work(
        self, jobs: Sequence[Any], shared: Any, *, timeout: float | None = None
    ) -> Iterator[tuple[Any, Any | LostJob]]:
        """See `WorkingGrid.work`."""
        return self._pool.work(jobs, shared, timeout)

    def _execute(self, tasks: Sequence[Task], timeout: float | None) -> Iterator[tuple[int, Outcome]]:
        return self._pool.run(tasks, timeout)
