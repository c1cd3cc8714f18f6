"""Arrays come through the shared memory as they went in, whatever lay there before."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedmm.engines import memory
from fedmm.engines.memory import Memory, pack, unpack
from fedmm.engines.ray_workers import RayGrid, RayPool

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def grid():
    sys.path.insert(0, str(HERE))
    with RayPool("echo_app:app", 2, "memory_jobs:work") as pool:
        yield RayGrid(pool, 3)
    sys.path.remove(str(HERE))


def both_ends():
    here = Memory()
    return here, Memory(here.path)


@given(
    st.lists(
        npst.arrays(st.sampled_from(["f4", "f8", "i8", "?"]), npst.array_shapes(max_dims=3, min_side=0, max_side=9)),
        max_size=6,
    ),
    st.booleans(),
)
@settings(max_examples=60)
def test_what_goes_in_comes_out(arrays, copy):
    one, other = both_ends()
    one.pack(np.full(3000, 7.0))  # what lay there before
    value = {"arrays": arrays, "views": [a.T for a in arrays], "word": ("x", 1)}
    got = other.unpack(one.pack(value), copy=copy)
    assert got["word"] == ("x", 1)
    for a, b in zip(arrays + value["views"], got["arrays"] + got["views"], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_it_grows_at_both_ends():
    one, other = both_ends()
    for size in (10, 10**6, 5, 3 * 10**6):
        value = np.random.default_rng(size).normal(size=size)
        np.testing.assert_array_equal(other.unpack(one.pack(value), copy=True), value)
        np.testing.assert_array_equal(one.unpack(other.pack(-value), copy=True), -value)


def test_copies_outlive_the_next_and_the_others_are_read_only():
    one, other = both_ends()
    packed = one.pack(np.ones(4))
    copied, seen = other.unpack(packed, copy=True), other.unpack(packed, copy=False)
    one.pack(np.zeros(4))
    assert copied.tolist() == [1] * 4
    assert copied.flags.writeable
    assert seen.tolist() == [0] * 4
    assert not seen.flags.writeable


def open_memories():
    """How many areas of shared memory this process holds open (other files come and go beside the test)."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            found += "memfd:fedmm" in os.readlink(entry)
    return found


def test_nothing_stays_open():
    gc.collect()
    before = open_memories()
    for _ in range(5):
        one, other = both_ends()
        one.pack(np.ones(10**5))
        assert open_memories() >= before + 2
        one.close(), other.close()
        assert open_memories() == before


def test_it_ends_with_its_owner():
    code = "import sys; from fedmm.engines.memory import Memory; m = Memory(); print(m.path, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]
    )
    path = owner.stdout.readline().strip()
    Memory(path).close()
    owner.kill()
    owner.communicate()
    with pytest.raises(OSError):
        Memory(path)


def test_without_it_all_goes_with_the_message(monkeypatch):
    def refuse(name):
        raise OSError

    monkeypatch.setattr(memory.os, "memfd_create", refuse)
    assert memory.new_memory() is None
    value = [np.arange(5), "x"]
    got = unpack(pack(value, None), None)
    np.testing.assert_array_equal(got[0], value[0])
    assert got[1] == "x"


def test_jobs_and_results_of_workers(grid):
    jobs = [("echo", np.full(1000 + i, i)) for i in range(9)]
    found = {id(job): result for job, result in grid.work(jobs, None)}
    for i, job in enumerate(jobs):
        assert found[id(job)][0].tolist() == [i] * (1000 + i)


def test_what_workers_share_is_this_orders(grid):
    for number in (1, 2):
        jobs = [("add", np.zeros(4)) for _ in range(4)]
        results = [r for _, r in grid.work(jobs, np.full(4, number))]
        assert [r[0].tolist() for r in results] == [[number] * 4] * 4


def test_a_worker_may_change_its_job_but_not_what_all_share(grid):
    job = ("spoil", np.ones(4))
    ((done, result),) = grid.work([job], None)
    assert done is job
    assert job[1].tolist() == [1] * 4
    assert result.tolist() == [0] * 4
    ((_, lost),) = grid.work([("write shared",)], np.zeros(4))
    assert "read-only" in lost.reason


def test_ray_without_shared_memory_gives_the_same(monkeypatch):
    monkeypatch.setattr("fedmm.engines.ray_workers.new_memory", lambda: None)
    monkeypatch.syspath_prepend(str(HERE))
    with RayPool("echo_app:app", 1, "memory_jobs:work") as pool:
        ((job, result),) = RayGrid(pool, 3).work([("add", np.arange(4))], 1.0)
    assert job[0] == "add"
    assert result[0].tolist() == [1, 2, 3, 4]
