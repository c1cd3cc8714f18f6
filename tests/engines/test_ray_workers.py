"""Ray workers: the same bits as in process, and no reply lost when workers are killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from support import APP, CLIENTS, arrays, by_partition, messages, pids, processes

from fedmm.engines import ray_workers
from fedmm.engines.inprocess import InProcessGrid
from fedmm.engines.processes import descendants
from fedmm.engines.ray_workers import RayGrid, RayPool
from fedmm.errors import RunError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def pools():
    """Pools of 1, 2 and 3 workers on one Ray instance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_workers, "START_SECONDS", 150.0)  # for so many at once, on a machine that may be busy
        made = {workers: RayPool(APP, workers) for workers in (1, 2, 3)}
        yield made
        for pool in made.values():
            pool.close()


@pytest.fixture
def pool(pools):
    return pools[2]


@pytest.fixture
def grid(pool):
    return RayGrid(pool, CLIENTS)


def rounds(grid, order=None):
    """Three rounds with a failing client in the second, as comparable values."""
    out = []
    for action in ("train", "train.fail", "train"):
        sent = messages(grid, action, arrays(len(out)), partitions=[1, 4])
        if order is not None:
            order.shuffle(sent)
        out.append(by_partition(grid, grid.send_and_receive(sent)))
    return out


@pytest.fixture(scope="module")
def expected():
    return rounds(InProcessGrid(APP, CLIENTS))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_same_bits_as_in_process(pools, workers, expected):
    assert rounds(RayGrid(pools[workers], CLIENTS)) == expected
    assert rounds(RayGrid(pools[workers], CLIENTS), random.Random(workers)) == expected


def test_workers_are_kept_and_all_used(pools):
    pools[3].wait(3)
    seen = []
    for _ in range(2):
        grid = RayGrid(pools[3], 24)
        replies = grid.send_and_receive(messages(grid, "train.slow", seconds=0.02))
        seen.append(pids(replies))
        assert {reply.content["metrics"]["nice"] for reply in replies} == {os.nice(0)}
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    assert os.getpid() not in seen[0]


def test_workers_load_only_what_jobs_need():
    """A worker that dies is replaced in mid-round, by one that imports all of this anew."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fedmm.engines.ray_worker, clients.crew\n"
        "heavy = {'flwr', 'pandas', 'pyarrow', 'scipy', 'sklearn', 'matplotlib', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(HERE.parents[1])], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_workers_use_one_thread(grid):
    assert {r.content["metrics"]["threads"] for r in grid.send_and_receive(messages(grid, "query"))} == {1}


def test_a_shared_record_is_sent_once(pool):
    grid = RayGrid(pool, 40)
    before = pool.shared_records
    sent = messages(grid, record=arrays(1))
    other = arrays(2)
    for message in sent[:10]:
        message.content["more"] = other
    sent[0].content["alone"] = arrays(3)
    replies = by_partition(grid, grid.send_and_receive(sent))
    assert pool.shared_records - before == 2
    here = InProcessGrid(APP, 40)
    again = [type(m)(m.content, m.metadata.dst_node_id, m.metadata.message_type) for m in sent]
    assert replies == by_partition(here, here.send_and_receive(again))


def test_handlers_cannot_spoil_a_shared_record(grid):
    expected = by_partition(grid, grid.send_and_receive(messages(grid)))
    spoilt = by_partition(grid, grid.send_and_receive(messages(grid, "train.spoil")))
    assert {p: data for p, (data, _) in spoilt.items()} == {p: data for p, (data, _) in expected.items()}


def test_a_worker_killed_in_mid_chunk_costs_no_reply(pool):
    pool.wait(2)
    grid, here = RayGrid(pool, 24), InProcessGrid(APP, 24)
    victims = pids(grid.send_and_receive(messages(grid, "query")))
    deaths = pool.deaths
    killer = threading.Timer(0.15, lambda: os.kill(min(victims), signal.SIGKILL))
    killer.start()
    replies = grid.send_and_receive(messages(grid, "train.slow", seconds=0.04))
    killer.join()
    assert pool.deaths == deaths + 1
    assert by_partition(grid, replies) == by_partition(here, here.send_and_receive(messages(here)))


def test_workers_killed_while_idle_cost_no_reply(pool):
    pool.wait(2)
    grid = RayGrid(pool, 24)
    for pid in pids(grid.send_and_receive(messages(grid, "train.slow", seconds=0.02))):
        os.kill(pid, signal.SIGKILL)
    replies = grid.send_and_receive(messages(grid))
    assert len(by_partition(grid, replies)) == 24
    assert not any(reply.has_error() for reply in replies)


def test_nothing_is_printed_when_workers_die(pool, capfd):
    grid = RayGrid(pool, 2)
    grid.send_and_receive(messages(grid, "train.die", partitions=[0]))
    time.sleep(1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_worker_killed_while_it_starts_is_replaced(pools, monkeypatch):
    monkeypatch.setattr(ray_workers, "START_SECONDS", 35.0)  # after which it is missed
    for workers, pool in pools.items():  # or the new one takes a process that Ray has started for them
        pool.wait(workers)

    def starting():
        mine = descendants(os.getpid())  # tests that run beside this one have workers too
        return {pid for pid, _, command in processes() if pid in mine and is_worker(command)}

    before = starting()
    with RayPool(APP, 1) as pool:
        limit = time.monotonic() + 10
        while not (new := starting() - before) and time.monotonic() < limit:
            time.sleep(0.01)
        for pid in new:
            os.kill(pid, signal.SIGKILL)
        grid = RayGrid(pool, 3)
        assert len(by_partition(grid, grid.send_and_receive(messages(grid)))) == 3
    assert new


def is_worker(command):
    # The raylet's own arguments name the program that its workers run.
    program, *rest = command.split("\0")
    return not program.endswith("raylet") and any(word.endswith("default_worker.py") for word in rest)


def test_a_client_that_always_kills_its_worker_loses_only_its_own_reply(pool):
    grid, here = RayGrid(pool, 16), InProcessGrid(APP, 16)
    replies = by_partition(grid, grid.send_and_receive(messages(grid, "train.die", partitions=[3])))
    code, reason = replies.pop(3)
    assert code == 8
    assert reason.startswith("4 workers died of this message")
    expected = by_partition(here, here.send_and_receive(messages(here)))
    del expected[3]
    assert replies == expected


def test_deadline_and_closing_abandon_slow_clients(pool):
    pool.wait(2)
    grid = RayGrid(pool, 2)
    nodes = grid.get_node_ids()
    # On a busy machine two seconds are enough for a reply, and two minutes for everything.
    slow = messages(grid, "train.slow", nodes=nodes[:1], seconds=150)
    started = time.monotonic()
    replies = list(grid.stream(slow + messages(grid, nodes=nodes[1:]), timeout=2))
    assert [reply.metadata.src_node_id for reply in replies] == nodes[1:]
    stream = grid.stream(messages(grid, "train.slow", nodes=nodes[:1], seconds=150) + messages(grid, nodes=nodes[1:]))
    next(stream)
    stream.close()
    assert len(grid.send_and_receive(messages(grid))) == 2
    assert time.monotonic() - started < 120


@pytest.mark.parametrize(("app", "text"), [("bad_app:app", "a_module_that_does_not_exist"), ("dying_app:app", "died")])
def test_an_app_that_cannot_start_is_a_run_error(pools, app, text):
    started = time.monotonic()
    with RayPool(app, 1) as broken, pytest.raises(RunError, match=text):
        broken.wait()
    assert time.monotonic() - started < 60
    assert ray.is_initialized()


def test_a_closed_pool_says_so(pools):
    closed = RayPool(APP, 1)
    closed.close()
    closed.close()
    grid = RayGrid(closed, 1)
    with pytest.raises(RunError, match="shut down"):
        grid.send_and_receive(messages(grid))


PROGRAM = """
import sys, time, os
sys.path[:0] = {path!r}
from fedmm.engines.ray_workers import RayGrid, RayPool
from support import messages, pids
pool = RayPool("echo_app:app", 2)
pool.wait(2)
grid = RayGrid(pool, 8)
print(*pids(grid.send_and_receive(messages(grid, "train.slow", seconds=0.02))), flush=True)
{end}
"""


def start_driver(directory, end):
    path = [str(HERE), str(HERE.parents[1])]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(path=path, end=end)],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def living(session):
    """Commands of the living processes of a session (Ray's and the workers' included)."""
    return [command for _, its_session, command in processes() if its_session == session]


def wait_until_empty(session, seconds=30):
    # Ray's agents look for their parent every few seconds, which matters where the driver itself was killed.
    limit = time.monotonic() + seconds
    while living(session) and time.monotonic() < limit:
        time.sleep(0.1)
    return living(session)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "end", ["pool.close()", pytest.param("", marks=SLOW), pytest.param("os.kill(os.getpid(), 9)", marks=SLOW)]
)
def test_no_process_is_left_after_the_end(tmp_path, end):
    driver = start_driver(tmp_path, end)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == (-9 if "kill" in end else 0), err
    assert len(out.split()) == 2
    assert wait_until_empty(driver.pid) == []
    # Without any network Ray says on stderr that it falls back to the host's name; anything else is ours.
    assert [line for line in err.splitlines() if "network_util.cc" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_leaves_nothing(tmp_path, whole_group):
    end = 'grid.send_and_receive(messages(grid, "train.slow", seconds=60))'
    driver = start_driver(tmp_path, end)
    workers = driver.stdout.readline().split()
    assert len(workers) == 2
    time.sleep(0.3)
    (os.killpg if whole_group else os.kill)(driver.pid, signal.SIGINT)
    _, err = driver.communicate(timeout=30)
    assert "KeyboardInterrupt" in err
    assert wait_until_empty(driver.pid) == []
