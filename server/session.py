"""The server's line to its clients: discovery, training, measuring. The only server file that handles messages.

Clients in processes of this machine are asked by jobs (`server/crews.py`), all others by messages; nothing above this
file knows which.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedmm.engines.grid import WorkingGrid, stream_replies
from fedmm.errors import RunError
from fedmm.metrics.fields import Fields, fault
from fedmm.models.blocks import block_of, bytes_per_block, serves
from fedmm.models.width import Shapes, corner
from fedmm.objectives.watched import METHOD, method_sums
from fedmm.personal import tensor_of
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, Terms, read_reply, task_record, to_record
from server.admission import Refusal, admit, parse
from server.aggregation import merge_reports
from server.crews import Answers, Crews, Order
from server.facts import Federates

OBSERVATION = "observation"
"""What the bytes of the observatory are counted as, whatever blocks they belong to."""

_DISCOVERY_S = 120.0


@dataclass
class Traffic:
    """Payload bytes by block since it was last emptied."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    def add(self, direction: dict[str, int], parts: Mapping[str, int], times: int = 1) -> None:
        """Count the blocks of a message, or of as many equal ones."""
        for block, size in parts.items():
            direction[block] = direction.get(block, 0) + size * times


@dataclass(frozen=True)
class Parcel:
    """What goes down with a task: the model, restricted to what a client owns, and knowledge.

    Records are made once a round and shared by all clients that get the same.

    Attributes:
        model: Whole model.
        broadcast: Knowledge; of what begins with "client." each client is sent its own row.
        narrow: Width -> shapes of the tensors of which devices of this width get the leading corner.
        personal: Client -> what the strategy has for this client alone; None: nothing for anybody.
    """

    model: Tensors
    broadcast: Tensors = field(default_factory=dict)
    narrow: Mapping[int, Shapes] = field(default_factory=dict)
    personal: Callable[[int], Tensors] | None = None
    _records: dict[tuple[tuple[str, ...], int | None], ArrayRecord] = field(default_factory=dict)
    _sizes: dict[tuple[tuple[str, ...], int | None], dict[str, int]] = field(default_factory=dict)

    def part(self, modalities: tuple[str, ...], width: int | None = None) -> Tensors:
        """What a client that owns `modalities`, of some width, is sent of the model."""
        mine = {n: t for n, t in self.model.items() if serves(n, modalities)}
        return mine if width is None else corner(mine, self.narrow[width])

    @cached_property
    def own(self) -> Tensors:
        """Knowledge of which each client is sent its own row, [K, ...]."""
        return {n: t for n, t in self.broadcast.items() if n.startswith("client.")}

    def personal_part(self, modalities: tuple[str, ...], client: int) -> Tensors:
        """What the strategy has for a client that owns `modalities`."""
        if self.personal is None:
            return {}
        return {n: t for n, t in self.personal(client).items() if serves(tensor_of(n), modalities)}

    def records(self, modalities: tuple[str, ...], width: int | None = None, client: int = 0) -> RecordDict:
        """Array records for a client that owns `modalities`."""
        if (modalities, width) not in self._records:
            self._records[modalities, width] = to_record(self.part(modalities, width))
        content = RecordDict({"model": self._records[modalities, width]})
        if len(self.broadcast) > len(self.own):
            if ((), None) not in self._records:
                self._records[(), None] = to_record({n: t for n, t in self.broadcast.items() if n not in self.own})
            content["broadcast"] = self._records[(), None]
        if own := {n: t[client] for n, t in self.own.items()} | self.personal_part(modalities, client):
            content["own"] = to_record(own)
        return content

    def size(self, modalities: tuple[str, ...], width: int | None = None) -> dict[str, int]:
        """Bytes by block of what a client that owns `modalities` is sent."""
        if (modalities, width) not in self._sizes:
            size = bytes_per_block(self.part(modalities, width))
            if self.broadcast:
                size["broadcast"] = broadcast_bytes(self.broadcast)
            if mine := self.personal_part(modalities, 0):
                size["personal"] = _bytes(mine)
            self._sizes[modalities, width] = size
        return self._sizes[modalities, width]


class Session:
    """Knows which node is which client, sends tasks and gives replies back sorted by client.

    Args:
        grid: Any Flower grid.
        spec: `client_spec` of the run.
        clients: K.
        on_reply: Called with (replies so far, asked) as replies come.
        cohort: Clients in a stack, where the grid takes jobs.

    Attributes:
        crews: The short way to the clients, if the grid has one.
        traffic: Bytes since it was last emptied.
    """

    def __init__(
        self, grid: Grid, spec: str, clients: int, on_reply: Callable[[int, int], None], cohort: int = 1
    ) -> None:
        self._grid, self._spec, self._clients, self._on_reply = grid, spec, clients, on_reply
        self._nodes: dict[int, int] = {}
        self.crews: Crews | None = None
        if isinstance(grid, WorkingGrid) and grid.crew is not None:
            self.crews = Crews(grid, spec, cohort, on_reply)
        self.traffic = Traffic()

    def connect(self, modalities: tuple[str, ...]) -> tuple[Federates, dict[int, ReplyHeader]]:
        """Find every client (each node is asked who it is); what they said, sorted by client.

        Raises:
            RunError: Clients are missing, doubled, or cannot open their data.
        """
        nodes = self._await_nodes()
        if self.crews is not None:
            said = self.crews.hello()
            if isinstance(said, str):
                raise RunError(f"the clients do not answer: {said}", where="data")
            self._nodes = dict(enumerate(nodes))
            return self._facts(modalities, {h.client: h for h in said})
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
        return self._facts(modalities, {k: headers[k] for k in range(self._clients)})

    @staticmethod
    def _facts(modalities: tuple[str, ...], hellos: dict[int, ReplyHeader]) -> tuple[Federates, dict[int, ReplyHeader]]:
        owned, samples = tuple(h.modalities for h in hellos.values()), tuple(h.samples for h in hellos.values())
        return Federates(modalities, owned, samples), hellos

    def train(self, order: Order, parcel: Parcel) -> Answers:
        """Have clients train once; everything that came is admitted or refused, and metered."""
        widths = {k: terms.width for k, terms in order.terms.items()}
        for (owned, width), count in Counter(
            (order.expected(p).owned, widths.get(p.client)) for p in order.picks
        ).items():
            self.traffic.add(self.traffic.down, parcel.size(owned, width), count)
        if self.crews is not None:
            personal = None if parcel.personal is None else parcel.personal_part
            answers = self.crews.train(order, parcel.model, parcel.broadcast, personal)
        else:
            answers = self._train_by_messages(order, parcel)
        kinds = Counter((u.trained, u.modalities, widths.get(u.client)) for u in answers.updates)
        for (trained, modalities, width), count in kinds.items():
            held, blocks = parcel.model | parcel.part(modalities, width), set(trained)
            size = bytes_per_block({n: t for n, t in held.items() if block_of(n) in blocks})
            self.traffic.add(self.traffic.up, size, count)
        for report in [u.report for u in answers.updates if u.report]:
            seen = method_sums(report) if METHOD in order.requests else {}
            if len(seen) < len(report):
                self.traffic.add(self.traffic.up, {"report": _bytes(report) - _bytes(seen)})
            if seen:
                self.traffic.add(self.traffic.up, {OBSERVATION: _bytes(seen)})
        return answers

    def _train_by_messages(self, order: Order, parcel: Parcel) -> Answers:
        tasks = [
            Task(
                self._spec,
                order.round,
                p.client,
                p.modalities,
                order.requests,
                epochs=order.epochs,
                lr=order.lr,
                attempt=order.attempt,
                terms=order.terms.get(p.client, Terms()),
            )
            for p in order.picks
        ]
        expected = [order.expected(p) for p in order.picks]
        replies = self._ask("train", tasks, parcel, [e.owned for e in expected], order.deadline)
        answers = Answers()
        for wanted, (task, message) in zip(expected, replies, strict=True):
            if message is None:
                answers.late.append(task.client)
                continue
            result = admit(message, task, wanted, order.samples[task.client])
            if isinstance(result, Refusal):
                answers.refusals.append(result)
            else:
                answers.updates.append(replace(result, place=order.places[task.client], lr=order.lr))
        return answers

    def measure(
        self,
        split: str,
        clients: Sequence[int],
        owned: Sequence[tuple[str, ...]],
        parcel: Parcel,
        fields: Callable[[tuple[str, ...]], Fields],
        request: str | None,
        round: int,
        deadline: float | None = None,
    ) -> tuple[Tensors, dict[int, float], list[Refusal]]:
        """Merged sums over one split of some clients, the sum of losses of each, and whose figures are left out.

        Args:
            split: Which split.
            clients: Partition indices, ascending.
            owned: Modalities that each client's samples of the split come with.
            parcel: Model and probes.
            fields: Owned modalities -> what a report must hold.
            request: A statistic, or None for an evaluation.
            round: Round.
            deadline: Seconds to wait.
        """
        for kind in set(owned):
            self.traffic.add(self.traffic.down, parcel.size(kind), owned.count(kind))
        if self.crews is not None:
            found = self.crews.measure(split, clients, parcel.model, parcel.broadcast, request, deadline)
            if found is not None:
                for kind in set(owned):
                    size = sum(8 * prod(f.shape) for f in fields(kind).values())
                    self.traffic.add(self.traffic.up, {"report": size}, owned.count(kind))
                return *found, []
        tasks = [Task(self._spec, round, k, requests=(request,) if request else (), split=split) for k in clients]
        replies = self._ask("query.statistics" if request else "evaluate", tasks, parcel, owned, deadline)
        good, bad = self._read(replies, [fields(o) for o in owned])
        losses = {h.client: float(r["loss"]) for h, r in good if "loss" in r}
        return merge_reports([report for _, report in good]), losses, bad

    def observe(
        self,
        split: str,
        clients: Sequence[int],
        owned: Sequence[tuple[str, ...]],
        parcel: Parcel,
        fields: Callable[[tuple[str, ...]], Fields],
        what: tuple[str, ...],
        round: int,
        deadline: float | None = None,
    ) -> tuple[dict[int, Tensors], list[Refusal]]:
        """What each client observes (`fedmm.metrics.imbalance.observe`), by client, and whose reports are left out.

        Args:
            split: Which split.
            clients: Partition indices, ascending.
            owned: Modalities that each client's samples of the split come with.
            parcel: Model, probes and permutations.
            fields: Owned modalities -> what a report must hold.
            what: Kinds of observation.
            round: Round.
            deadline: Seconds to wait.
        """
        wanted = {kind: fields(kind) for kind in set(owned)}
        for kind in wanted:
            self.traffic.add(self.traffic.down, parcel.size(kind), owned.count(kind))
        if self.crews is not None:
            found = self.crews.observe(split, clients, parcel.model, parcel.broadcast, what, deadline)
            if found is not None:
                reasons = {k: fault(found[k], wanted[kind]) for k, kind in zip(clients, owned, strict=True)}
                good = {k: report for k, report in found.items() if reasons[k] is None}
                self.traffic.add(self.traffic.up, {"report": sum(map(_bytes, good.values()))})
                return good, [Refusal(k, "report", reason) for k, reason in reasons.items() if reason]
        tasks = [Task(self._spec, round, k, requests=what, split=split) for k in clients]
        replies = self._ask("query.observe", tasks, parcel, owned, deadline)
        read, bad = self._read(replies, [wanted[kind] for kind in owned])
        return {header.client: report for header, report in read}, bad

    @contextmanager
    def metered_as(self, block: str) -> Iterator[None]:
        """Count everything that is sent meanwhile under one name, whatever blocks it belongs to."""
        outer, self.traffic = self.traffic, Traffic()
        try:
            yield
        finally:
            inner, self.traffic = self.traffic, outer
            outer.add(outer.down, {block: sum(inner.down.values())})
            outer.add(outer.up, {block: sum(inner.up.values())})

    def _ask(
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
            content = parcel.records(modalities, task.terms.width, task.client)
            content["task"] = task_record(task)
            messages[self._nodes[task.client]] = Message(
                content, self._nodes[task.client], kind, group_id=str(task.round)
            )
        replies = self._exchange(messages, timeout)
        return [(task, replies.get(self._nodes[task.client])) for task in tasks]

    def _read(
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
                self.traffic.add(self.traffic.up, {"report": _bytes(parsed[1])})
        return good, bad

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


def broadcast_bytes(broadcast: Tensors) -> int:
    """Bytes of knowledge that one client is sent."""
    return _bytes({n: t[0] if n.startswith("client.") else t for n, t in broadcast.items()})


def _bytes(report: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in report.values())
