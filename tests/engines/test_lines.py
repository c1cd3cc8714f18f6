"""What is said on a line arrives, and each end notices when the other is gone."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest

from fedmm.engines.lines import Line
from fedmm.engines.ray_workers import RayGrid, RayPool
from fedmm.errors import RunError

HERE = Path(__file__).parent


@pytest.fixture
def ends():
    here = Line()
    there = Line.at(here.paths)
    here.taken()
    yield here, there
    here.close(), there.close()


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    with RayPool("echo_app:app", 1, "memory_jobs:work") as pool:
        yield pool


def test_words_arrive_in_order_both_ways(ends):
    here, there = ends
    for word in (None, ("a", 1), b"x" * 100):
        here.send(word)
        there.send([word])
    assert [there.receive() for _ in range(3)] == [None, ("a", 1), b"x" * 100]
    assert [here.receive() for _ in range(3)] == [[None], [("a", 1)], [b"x" * 100]]


def test_a_word_may_be_longer_than_a_pipe_holds(ends):
    here, there = ends
    word = os.urandom(5 * 2**20)
    sender = threading.Thread(target=here.send, args=(word,))
    sender.start()
    assert there.receive() == word
    sender.join()


def test_one_can_wait_for_it(ends):
    here, there = ends
    assert connection.wait([here.fileno()], 0) == []
    there.send(1)
    assert connection.wait([here.fileno()], 5) == [here.fileno()]


def test_the_end_of_the_other_side(ends):
    here, there = ends
    there.send("last word")
    there.close()
    assert here.receive() == "last word"
    with pytest.raises(EOFError):
        here.receive()
    with pytest.raises(BrokenPipeError):
        here.send("more")


def test_death_in_the_middle_of_a_word():
    here = Line()
    code = """
import os, struct, sys
from fedmm.engines.lines import Line
line = Line.at((sys.argv[1], sys.argv[2]))
line.send("ready")
line.receive()
os.write(line._writer.fileno(), struct.pack("!i", 1000) + b"x" * 10)
os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen([sys.executable, "-c", code, *here.paths], cwd=HERE.parents[1])
    assert here.receive() == "ready"
    here.taken()
    here.send("go")
    with pytest.raises(EOFError):
        here.receive()
    assert process.wait(30) == -9
    here.close()


def pipe(file):
    return os.readlink(f"/proc/self/fd/{file}")


def open_pipes():
    """Pipes that this process holds open, those of other threads included."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed by now
            found.add(os.readlink(entry))
    return found


@pytest.mark.parametrize("taken", [True, False])
def test_nothing_stays_open(taken):
    here = Line()
    mine = {pipe(here._reader.fileno()), pipe(here._writer.fileno())}
    if taken:
        there = Line.at(here.paths)
        assert {pipe(there._reader.fileno()), pipe(there._writer.fileno())} == mine
        here.taken()
        there.close()
    assert mine <= open_pipes()
    here.close()
    assert not mine & open_pipes()


def test_jobs_and_messages_in_turn(pool):
    from support import messages

    grid = RayGrid(pool, 2)
    for i in range(3):
        ((_, result),) = grid.work([("add", np.arange(3))], i)
        assert result[0].tolist() == [i, i + 1, i + 2]
        assert len(grid.send_and_receive(messages(grid))) == 2


def test_a_worker_that_dies_idle_is_replaced_and_nobody_charged(pool, capfd):
    grid = RayGrid(pool, 2)
    list(grid.work([("add", np.zeros(1))], 1))
    (pid,) = pool._pids.values()
    link = next(iter(pool._links.values()))
    os.kill(pid, 9)
    with pytest.raises(EOFError):
        link.line.receive()  # it is gone
    pool._pids = dict.fromkeys(pool._pids, os.getpid())  # as if that came between the look at it and its order
    ((_, result),) = grid.work([("add", np.zeros(1))], 2)
    assert result[0].tolist() == [2]
    assert pool.deaths == 1
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_takes_too_long_is_left_behind(pool):
    grid = RayGrid(pool, 2)
    list(grid.work([("add", np.zeros(1))], 1))
    (before,) = pool._pids.values()
    started = time.monotonic()
    assert list(grid.work([("sleep", 100.0)], None, timeout=0.5)) == []
    assert time.monotonic() - started < 30
    ((_, result),) = grid.work([("add", np.zeros(1))], 2)
    assert result[0].tolist() == [2]
    assert list(pool._pids.values()) != [before]
    assert pool.deaths == 0


class Unreadable:
    """A job that cannot be unpickled."""

    def __reduce__(self):
        import memory_jobs

        return memory_jobs.work, (("no such job",), None)


def test_what_a_worker_raises_outside_a_job_reaches_the_user(pool):
    with pytest.raises(RunError, match="no such job"):
        list(RayGrid(pool, 2).work([Unreadable()], 1))
