"""Time, processor time and memory of rounds. The standard library alone, for every contestant alike."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedmm.engines.processes import descendants

FEWEST = 3
"""Rounds that are counted however long they take, if so many are wanted."""


@dataclass
class Stopwatch:
    """Laps of one round each; the first `warmup` do not count, and after `rounds` more it is enough.

    Slow contestants may stop before that: after `FEWEST` rounds that count, once these have taken `budget` seconds.

    Attributes:
        seconds: Of each round that counts.
        samples: Training samples of each round that counts.
        first_round_at: Clock time (as `time.time`) of the end of the first round.
        processor: Processor seconds of all processes of this run during the rounds that count.
        others: Cores that the rest of the machine kept busy meanwhile, on average.
        memory: Bytes of all processes after the last round, shared pages counted once.
    """

    warmup: int
    rounds: int
    budget: float = float("inf")
    seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    first_round_at: float = 0.0
    processor: float = 0.0
    others: float = 0.0
    memory: int = 0
    _laps: int = 0
    _mark: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup == 0:
            self._begin()

    def lap(self, samples: int) -> bool:
        """Note the end of a round; True when no more are wanted."""
        now = time.perf_counter()
        self._laps += 1
        if self._laps == 1:
            self.first_round_at = time.time()
        if self._laps > self.warmup:
            self.seconds.append(now - self._mark)
            self.samples.append(samples)
        done = self._laps == self.warmup + self.rounds
        done |= len(self.seconds) >= FEWEST and sum(self.seconds) >= self.budget
        if done:
            self._end(sum(self.seconds))
            self.memory = memory_bytes(os.getpid())
        elif self._laps == self.warmup:
            self._begin()
        else:
            self._mark = now
        return done

    def result(self) -> dict[str, object]:
        """What was measured, for a JSON file."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _begin(self) -> None:
        self.processor, self.others = processor_seconds(os.getpid()), busy_seconds()
        self._mark = time.perf_counter()

    def _end(self, seconds: float) -> None:
        self.processor = processor_seconds(os.getpid()) - self.processor
        self.others = max(0.0, busy_seconds() - self.others - self.processor) / seconds


def processor_seconds(root: int) -> float:
    """User and system time of a living process and all below it, in ticks of 10 ms."""
    ticks = 0
    for pid in descendants(root):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Processor seconds of the whole machine since it started; 0 where the system does not tell."""
    with suppress(OSError):
        user, nice, system, _, _, interrupts, soft, steal = Path("/proc/stat").read_text().split()[1:9]
        return sum(map(int, (user, nice, system, interrupts, soft, steal))) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory_bytes(root: int) -> int:
    """Proportional set size of a process and all below it; 0 where the system does not tell."""
    total = 0
    for pid in descendants(root):
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total
