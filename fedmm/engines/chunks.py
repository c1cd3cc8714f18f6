"""What a worker is handed in one call, and what becomes of it when the worker dies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flwr.common.constant import ErrorCode

from fedmm.engines.grid import Outcome, Task, error_reply

DEATHS_BEFORE_ALONE = 2
DEATHS_BEFORE_ERROR = 4


@dataclass(frozen=True)
class Chunk:
    """Tasks, by their index, that one worker does in one call; `deaths` counts the workers that died of them."""

    indices: tuple[int, ...]
    deaths: int = 0


def guided(jobs: int, workers: int) -> Iterator[Chunk]:
    """Bundles of jobs: three quarters in one call a worker, the rest one by one to whoever is done first."""
    size = max(1, 3 * jobs // (4 * workers))
    first = min(jobs, size * workers)
    # Dealt in turn: jobs come in order of length.
    for worker in range(min(workers, first)):
        yield Chunk(tuple(range(worker, first, workers)))
    for job in range(first, jobs):
        yield Chunk((job,))


def after_death(chunk: Chunk, tasks: Sequence[Task], error: Exception) -> tuple[list[Chunk], list[Outcome]]:
    """What to run again, and the error outcomes of a chunk whose worker died."""
    chunk = replace(chunk, deaths=chunk.deaths + 1)
    if chunk.deaths < DEATHS_BEFORE_ALONE:
        return [chunk], []
    if chunk.deaths < DEATHS_BEFORE_ERROR:
        return [Chunk((index,), chunk.deaths) for index in reversed(chunk.indices)], []
    reason = f"{chunk.deaths} workers died of this message: {' '.join(str(error).split())[:300]}"
    code = ErrorCode.CLIENT_APP_CRASHED
    return [], [Outcome(error_reply(tasks[index].message, code, reason)) for index in chunk.indices]
