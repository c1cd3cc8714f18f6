"""The server's line to its clients: discovery, messages, replies. The only server file that handles messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmm.engines.grid import stream_replies
from fedmm.errors import RunError
from fedmm.metrics.fields import Fields, fault
from fedmm.models.blocks import bytes_per_block, serves
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, read_reply, task_record, to_record
from server.admission import Refusal, parse
from server.knowledge import Federates

_DISCOVERY_S = 120.0


@dataclass
class Traffic:
    """Payload bytes by block since it was last emptied."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def add(self, direction: dict[str, int], parts: Mapping[str, int]) -> None:
        """Count a message's blocks."""
        for block, size in parts.items():
            direction[block] = direction.get(block, 0) + size


@dataclass(frozen=True)
class Parcel:
    """What goes down with a task: the model, restricted to what a client owns, and knowledge.

    Records are made once a round and shared by all clients that get the same.
    """

    model: Tensors
    broadcast: Tensors = field(default_factory=dict)
    _records: dict[tuple[str, ...], tuple[ArrayRecord, dict[str, int]]] = field(default_factory=dict)

    def records(self, modalities: tuple[str, ...]) -> tuple[RecordDict, dict[str, int]]:
        """Array records for a client that owns `modalities`, and their bytes by block."""
        if modalities not in self._records:
            part = {n: t for n, t in self.model.items() if serves(n, modalities)}
            self._records[modalities] = (to_record(part), bytes_per_block(part))
        record, size = self._records[modalities]
        content = RecordDict({"model": record})
        if self.broadcast:
            if () not in self._records:
                size_of = sum(t.numel() * t.element_size() for t in self.broadcast.values())
                self._records[()] = (to_record(self.broadcast), {"broadcast": size_of})
            content["broadcast"] = self._records[()][0]
            size = size | self._records[()][1]
        return content, size


class Session:
    """Knows which node is which client, sends tasks and gives replies back sorted by client.

    Args:
        grid: Any Flower grid.
        spec: `client_spec` of the run.
        clients: K.
        on_reply: Called with (replies so far, asked) as replies come.
    """

    def __init__(self, grid: Grid, spec: str, clients: int, on_reply: Callable[[int, int], None]) -> None:
        self._grid, self._spec, self._clients, self._on_reply = grid, spec, clients, on_reply
        self._nodes: dict[int, int] = {}
        self.traffic = Traffic()

    def connect(self, modalities: tuple[str, ...]) -> tuple[Federates, dict[int, ReplyHeader]]:
        """Find every client (each node is asked who it is); what they said, sorted by client.

        Raises:
            RunError: Clients are missing, doubled, or cannot open their data.
        """
        nodes = self._await_nodes()
        task = Task(self._spec, 0, -1)
        messages = {n: Message(RecordDict({"task": task_record(task)}), n, "query") for n in nodes}
        headers: dict[int, ReplyHeader] = {}
        by_id = self._exchange(messages, None)
        for node in nodes:
            reply = by_id.get(node)
            if reply is None or reply.has_error():
                reason = "no reply" if reply is None else reply.error.reason
                raise RunError(f"a client does not answer: {reason}", where=f"node {node}")
            raw = read_reply(reply)[0]
            if raw.client in headers or not 0 <= raw.client < self._clients:
                raise RunError(
                    f"partition {raw.client} is doubled or outside 0..{self._clients - 1}",
                    where=f"node {node}",
                    remedy="give each node its own partition-id, and scenario.clients their number",
                )
            headers[raw.client], self._nodes[raw.client] = raw, node
        # Sorted by client: node ids are random in Flower, and sums follow this order.
        hellos = {k: headers[k] for k in range(self._clients)}
        owned, samples = tuple(h.modalities for h in hellos.values()), tuple(h.samples for h in hellos.values())
        return Federates(modalities, owned, samples), hellos

    def ask(
        self,
        kind: str,
        tasks: Sequence[Task],
        parcel: Parcel,
        owned: Sequence[tuple[str, ...]],
        timeout: float | None = None,
    ) -> list[tuple[Task, Message | None]]:
        """Send each task to its client with the blocks of `owned[i]`; replies in the order of `tasks`, None if late."""
        messages = {}
        for task, modalities in zip(tasks, owned, strict=True):
            content, size = parcel.records(modalities)
            content["task"] = task_record(replace(task, spec=self._spec))
            messages[self._nodes[task.client]] = Message(
                content, self._nodes[task.client], kind, group_id=str(task.round)
            )
            self.traffic.add(self.traffic.down, size)
        replies = self._exchange(messages, timeout)
        return [(task, replies.get(self._nodes[task.client])) for task in tasks]

    def read(
        self, replies: Iterable[tuple[Task, Message | None]], fields: Sequence[Fields]
    ) -> tuple[list[tuple[ReplyHeader, Tensors]], list[Refusal]]:
        """Headers and reports of replies without a model, and the refusals among them; `fields` as the replies."""
        good, bad = [], []
        for (task, message), wanted in zip(replies, fields, strict=True):
            parsed = Refusal(task.client, "late", "no reply in time") if message is None else parse(message, task)
            if not isinstance(parsed, Refusal) and (reason := fault(parsed[1], wanted)):
                parsed = Refusal(task.client, "report", reason)
            if isinstance(parsed, Refusal):
                bad.append(parsed)
            else:
                good.append((parsed[0], parsed[1]))
                self.count_up(parsed[1], {})
        return good, bad

    def count_up(self, report: Tensors, model: Tensors) -> None:
        """Meter a reply."""
        size = sum(t.numel() * t.element_size() for t in report.values())
        self.traffic.add(self.traffic.up, bytes_per_block(model) | ({"report": size} if size else {}))

    def _exchange(self, messages: Mapping[int, Message], timeout: float | None) -> dict[int, Message]:
        """Replies by node: the first to each message stands; a second one, or one to another message, is dropped."""
        replies: dict[int, Message] = {}
        sent = list(messages.values())
        for reply in stream_replies(self._grid, sent, timeout):
            # An error reply for a lost node comes from the server itself: the message id tells whose it is.
            answered = reply.metadata.reply_to_message_id
            for node in (n for n, m in messages.items() if m.metadata.message_id == answered):
                replies.setdefault(node, reply)
            self._on_reply(len(replies), len(sent))
        return replies

    def _await_nodes(self) -> list[int]:
        deadline = time.monotonic() + _DISCOVERY_S
        while len(nodes := sorted(self._grid.get_node_ids())) < self._clients:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{len(nodes)} of {self._clients} clients are connected after {_DISCOVERY_S:.0f} s",
                    where="scenario.clients",
                    remedy="start the missing clients, or lower scenario.clients to the number of nodes",
                )
            time.sleep(0.2)
        if len(nodes) > self._clients:
            raise RunError(
                f"{len(nodes)} nodes are connected, but scenario.clients is {self._clients}",
                where="scenario.clients",
                remedy="set it to the number of nodes",
            )
        return nodes
