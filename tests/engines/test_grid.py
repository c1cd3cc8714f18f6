"""The contract of our own grids, shown on the one without processes."""

import os
import time

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from support import APP, CLIENTS, arrays, by_partition, messages, pids

from fedmm.engines import ENGINES
from fedmm.engines.grid import stream_replies
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import RunError


@pytest.fixture
def grid():
    return InProcessGrid(APP, CLIENTS)


def test_every_engine_has_a_line():
    assert set(ENGINES) == {"inproc", "ray", "flower"}
    assert all(line and "\n" not in line for line in ENGINES.values())


def test_node_ids_are_not_partitions(grid):
    partitions = [grid.contexts[node].node_config["partition-id"] for node in grid.get_node_ids()]
    assert partitions == list(range(CLIENTS))
    assert not set(partitions) & set(grid.get_node_ids())
    assert [node.node_id for node in grid.get_nodes()] == grid.get_node_ids()


def test_all_ways_to_send_agree(grid):
    ways = [
        lambda g, m: g.send_and_receive(m),
        lambda g, m: g.pull_messages(g.push_messages(m)),
        lambda g, m: [g.push_messages(m), g.pull_messages()][1],
        lambda g, m: list(g.stream(m)),
        lambda g, m: list(stream_replies(g, m)),
    ]
    results = []
    for way in ways:
        fresh = InProcessGrid(APP, CLIENTS)
        results.append(by_partition(fresh, way(fresh, messages(fresh))))
    assert len(results[0]) == CLIENTS
    assert all(result == results[0] for result in results)


def test_replies_name_their_message(grid):
    sent = messages(grid)
    replies = grid.pull_messages(grid.push_messages(sent))
    nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
    assert len(nodes) == CLIENTS
    assert {reply.metadata.reply_to_message_id: reply.metadata.src_node_id for reply in replies} == nodes
    assert len({reply.metadata.message_id for reply in replies}) == CLIENTS


def test_pull_takes_only_what_was_asked_for(grid):
    first, *rest = grid.push_messages(messages(grid))
    assert len(grid.pull_messages([first])) == 1
    assert grid.pull_messages([first]) == []
    assert len(grid.pull_messages(message_ids=rest)) == CLIENTS - 1


def test_state_is_kept_over_rounds_and_discarded_on_error(grid):
    assert {calls for _, calls in by_partition(grid, grid.send_and_receive(messages(grid))).values()} == {1}
    failed = by_partition(grid, grid.send_and_receive(messages(grid, "train.fail", partitions=[2])))
    code, reason = failed.pop(2)
    assert code == 2
    assert reason.startswith("ValueError: two lines (")
    assert "echo_app.py:" in reason
    assert {calls for _, calls in failed.values()} == {2}
    third = by_partition(grid, grid.send_and_receive(messages(grid)))
    assert third[2][1] == 2
    assert {calls for partition, (_, calls) in third.items() if partition != 2} == {3}


def test_messages_to_one_client_run_in_order(grid):
    node = grid.get_node_ids()[3]
    replies = grid.send_and_receive(messages(grid, nodes=[node] * 4))
    assert [reply.content["metrics"]["calls"] for reply in replies] == [1, 2, 3, 4]


def test_a_handler_cannot_spoil_the_shared_record(grid):
    record = arrays()
    expected = by_partition(grid, grid.send_and_receive(messages(grid, record=record)))
    spoilt = by_partition(grid, grid.send_and_receive(messages(grid, "train.spoil", record=record)))
    assert {p: data for p, (data, _) in spoilt.items()} == {p: data for p, (data, _) in expected.items()}
    assert len(record) == 1


def test_handlers_run_on_one_thread_here(grid):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        replies = grid.send_and_receive(messages(grid, "query"))
        assert {reply.content["metrics"]["threads"] for reply in replies} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert pids(replies) == {os.getpid()}


@pytest.fixture
def clock(monkeypatch):
    """A clock on which nothing but sleep takes time, as the machine may be busy."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    return now


def test_deadline_abandons_the_rest(grid, clock):
    replies = list(grid.stream(messages(grid, "train.slow", seconds=0.1), timeout=0.25))
    assert len(replies) == 3
    assert clock == pytest.approx([0.3])
    assert len(grid.send_and_receive(messages(grid))) == CLIENTS


def test_run_config_reaches_clients_as_a_copy():
    def app(message, context):
        seen.append(dict(context.run_config))
        context.run_config["a"] = 2
        return Message(RecordDict(), reply_to=message)

    seen = []
    grid = InProcessGrid(app, 2, {"a": 1})
    grid.send_and_receive(messages(grid) + messages(grid))
    assert seen == [{"a": 1}] * 4


@pytest.mark.parametrize(("result", "name"), [(None, "TypeError"), (SystemExit(3), "SystemExit")])
def test_odd_endings_become_error_replies(result, name):
    def app(message, context):
        if result is not None:
            raise result
        return result

    grid = InProcessGrid(app, 1)
    (reply,) = grid.send_and_receive(messages(grid))
    assert reply.error.code == 2
    assert reply.error.reason.startswith(name)


def test_keyboard_interrupt_is_not_swallowed():
    def app(message, context):
        raise KeyboardInterrupt

    grid = InProcessGrid(app, 1)
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(messages(grid))


def test_unknown_node_is_refused(grid):
    with pytest.raises(ValueError, match="no SuperNode 3"):
        grid.push_messages([Message(RecordDict({"c": ConfigRecord()}), 3, "train")])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("echo_app", "not an import path"),
        ("echo_app:nothing", "nothing"),
        ("echo_app:__name__", "not a client app"),
        ("bad_app:app", "a_module_that_does_not_exist"),
    ],
)
def test_an_app_that_cannot_be_loaded(path, text):
    with pytest.raises(RunError, match=text):
        InProcessGrid(path, 1)


class ForeignGrid(Grid):
    """Answers one message per pull, as a grid over a network might; loses the last message on push."""

    def __init__(self, inner):
        self.inner, self.ids, self.run_ = inner, [], None

    def set_run(self, run):
        self.run_ = run

    @property
    def run(self):
        return self.run_

    def create_message(self, *args, **kwargs):
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self):
        return self.inner.get_node_ids()

    def push_messages(self, messages):
        self.ids = self.inner.push_messages(messages)
        return [*self.ids[:-1], None]

    def pull_messages(self, reply_to_message_ids=None, **_):
        return self.inner.pull_messages(sorted(reply_to_message_ids)[:1])

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("polling is expected")


def test_stream_replies_polls_a_foreign_grid(grid):
    foreign = ForeignGrid(grid)
    replies = stream_replies(foreign, messages(foreign))
    first = next(replies)
    assert len({r.metadata.src_node_id for r in [first, *replies]}) == CLIENTS - 1


def test_stream_replies_stops_at_the_deadline(grid, clock):
    foreign = ForeignGrid(grid)
    foreign.pull_messages = lambda ids: []
    assert list(stream_replies(foreign, messages(foreign), timeout=0.1, poll=0.01)) == []
    assert clock == pytest.approx([0.1], abs=0.011)
