"""Many clients in one process: the jobs that engines on one machine hand out instead of messages.

A job's clients train as stacks where that pays and one by one where it does not, and their weighted models are added
up where they arise, over the fixed tree of `fedmm.trees`. What a job gives depends on the job and the data alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.cohort import Member, Meter
from clients.faults import planned_faults, spoil
from clients.outcome import Outcome
from clients.terms import fitted, local_schedule, workspace_on
from clients.together import train_together
from clients.workspace import Workspace, workspace
from fedmm.engines.allocator import keep_memory
from fedmm.jobs import (
    Arrays,
    Group,
    Hello,
    Measure,
    Measured,
    Observe,
    Shared,
    Single,
    Train,
    Trained,
    arrays,
    tensors,
    turned,
)
from fedmm.metrics.imbalance import observe
from fedmm.metrics.local import STATISTICS, evaluate_samples
from fedmm.models.blocks import blocks_of, is_float
from fedmm.models.width import padded
from fedmm.trees import add_named, run_sum
from fedmm.types import SPLITS, ClientData, Tensors
from fedmm.wire import ReplyHeader, Terms


def work(job: Any, shared: Shared) -> Any:
    """Do one job; its type says what."""
    # One thread: many clients share the machine, and sums must not depend on how many cores it has.
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    keep_memory()
    return _WORK[type(job)](job, shared, workspace(shared.spec, None, shared.home))


@dataclass
class _Received:
    shared: Shared | None = None
    model: Tensors = field(default_factory=dict)
    broadcast: Tensors = field(default_factory=dict)


_received = _Received()


def _receive(shared: Shared, here: Workspace) -> tuple[Tensors, Tensors]:
    """The round's tensors, made once a round and process."""
    if _received.shared is not shared:
        _received.shared = shared
        _received.model = {n: t.to(here.device) for n, t in tensors(shared.model).items()}
        _received.broadcast = {n: t.to(here.device) for n, t in tensors(shared.broadcast).items()}
    return _received.model, _received.broadcast


# -- training -----------------------------------------------------------------------------------------------------


class _NotFiniteError(Exception):
    """A sum has values that are not finite: some client's model must have them."""


def _train(job: Train, shared: Shared, here: Workspace) -> Trained:
    faulty = {k for k in job.clients if planned_faults(here.config.faults, k, job.round, job.attempt)}
    for k in job.clients:
        if any(f.kind == "kill" for f in planned_faults(here.config.faults, k, job.round, job.attempt)):
            os.kill(os.getpid(), signal.SIGKILL)
    if faulty:
        job = replace(job, each=True)
    try:
        return _Crew(job, here, shared).run()
    except _NotFiniteError:
        return _Crew(replace(job, each=True), here, shared).run()


_Part = tuple[Sequence[int], Tensors]
"""Places of clients that trained together, ascending, and their models [n, ...]."""


class _Crew:
    """One job: recursion over the tree of its places, a stack or a single client at the leaves."""

    def __init__(self, job: Train, here: Workspace, shared: Shared) -> None:
        self._job, self._here, self._shared = job, here, shared
        self._model, broadcast = _receive(shared, here)
        self._broadcast = broadcast | {"round": torch.tensor(max(job.round - 1, 0), device=here.device)}
        self._groups: list[Group] = []
        self._singles: list[Single] = []
        self._meter = Meter()
        self._terms = job.terms or (Terms(),) * len(job.clients)
        self._cohort = job.cohort if here.stack is not None else 1
        self._stacked = here.stack_for(self._cohort) is not None
        self._turned: Tensors = {}
        if job.deltas is not None:
            wanted = {n: t for n, t in self._model.items() if n.startswith(job.deltas) and is_float(t)}
            self._turned = {n: turned(t.unsqueeze(0)).contiguous() for n, t in wanted.items()}

    def run(self) -> Trained:
        """Do the job."""
        with torch.no_grad():
            sums = self._node(*self._job.run) or {}
            # A sum over clients is finite only if every term is: one look at it admits them all.
            if sums and not bool(torch.isfinite(torch.stack([t.sum() for t in sums.values()])).all()):
                raise _NotFiniteError
            if not all(np.isfinite(a).all() for group in self._groups for a in group.report.values()):
                raise _NotFiniteError
        singles = tuple(sorted(self._singles, key=lambda s: s.place))
        return Trained(arrays(sums), tuple(self._groups), singles, self._meter.seconds)

    def _node(self, start: int, span: int) -> Tensors | None:
        if not any(start <= place < start + span for place in self._job.places):
            return None
        if span > max(self._cohort, self._job.leaf):
            return add_named(self._node(start, span // 2), self._node(start + span // 2, span // 2))
        parts = self._parts(start, span)
        return None if self._job.each else self._sum(start, span, parts)

    def _parts(self, start: int, span: int) -> list[_Part]:
        """Train the clients of a run, in stacks of aligned runs; those that send the same blocks, and their models."""
        if span > self._cohort:
            return self._parts(start, span // 2) + self._parts(start + span // 2, span // 2)
        stacks = self._stacks(self._job, start, span)
        return [part for kind, members in stacks.items() for part in self._train(members, self._company(kind, start))]

    def _stacks(self, job: Train, start: int, span: int) -> dict[tuple[Any, ...], list[int]]:
        """Who of a run shares a stack, by what they have in common."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        owned = self._here.pool("train").owned
        for i, (place, client) in enumerate(zip(job.places, job.clients, strict=True)):
            if start <= place < start + span:
                # A stack has one number format, one width, and one path in the seed tree.
                own = job.terms[i] if job.terms else Terms()
                alike = owned[client], job.modalities[i], own.precision, own.width, own.stream
                kinds.setdefault(alike, []).append(i)
        return kinds

    def _company(self, kind: tuple[Any, ...], place: int) -> list[Member]:
        """The stack that the clients of one kind at a place were to train in, if they are only a part of it."""
        whole = self._job.company
        if whole is None:
            return []
        which = self._stacks(whole, place - place % self._cohort, self._cohort)[kind]
        return [self._member(whole, i) for i in which]

    def _member(self, job: Train, i: int) -> Member:
        terms = job.terms[i] if job.terms else Terms()
        return Member(job.clients[i], local_schedule(self._here.config.train, job.epochs, job.lr, terms))

    def _train(self, which: Sequence[int], company: Sequence[Member]) -> list[_Part]:
        """Train some clients together."""
        job, shared = self._job, self._shared
        modalities, terms = job.modalities[which[0]], self._terms[which[0]]
        members = [self._member(job, i) for i in which]
        here, received, broadcast = self._here, self._model, self._broadcast
        if terms != Terms():
            here = workspace_on(terms, shared.spec, None, shared.home)
        if terms.width is not None:
            received, broadcast = fitted(received, here), fitted(broadcast, here)
        rows = [m.client for m in members]
        broadcast = {n: t[rows] if n.startswith("client.") else t for n, t in broadcast.items()}
        if job.personal:
            mine = [tensors(job.personal[i]) for i in which]
            broadcast |= {n: torch.stack([own[n] for own in mine]).to(here.device) for n in mine[0]}
        with torch.enable_grad():
            outcome = train_together(
                here,
                received,
                broadcast,
                members,
                modalities,
                job.round if terms.stream is None else terms.stream,
                job.requests,
                self._meter,
                self._cohort,
                company,
            )
        parts = [([which[row] for row in rows], part) for rows, part in outcome.parts()]
        for some, part in parts:
            self._keep(some, modalities, part)
        if not self._stacked and job.leaf > 1:
            # The next client trains in the same memory.
            parts = [(some, replace(part, model={n: t.clone() for n, t in part.model.items()})) for some, part in parts]
        return [([job.places[i] for i in some], part.model) for some, part in parts]

    def _keep(self, which: Sequence[int], modalities: tuple[str, ...], outcome: Outcome) -> None:
        """Keep what the server wants of clients that send the same blocks, besides the sums."""
        job, places = self._job, tuple(self._job.places[i] for i in which)
        if job.each:
            self._singles += [
                self._single(places[row], job.clients[i], modalities, outcome, row) for row, i in enumerate(which)
            ]
        else:
            deltas = {
                n: (self._turned[n] - turned(t)).to(torch.float32)
                for n, t in outcome.model.items()
                if n in self._turned
            }
            self._groups.append(
                Group(
                    places,
                    outcome.loss.numpy(),
                    outcome.steps.numpy(),
                    arrays(outcome.report),
                    arrays(deltas),
                    blocks_of(outcome.model),
                )
            )

    def _single(self, place: int, client: int, modalities: tuple[str, ...], outcome: Outcome, row: int) -> Single:
        samples = int(self._here.pool("train").sizes[client])
        header = ReplyHeader(
            self._job.round,
            client,
            samples,
            float(outcome.loss[row]),
            int(outcome.steps[row]),
            modalities,
        )
        reply = header, {n: t[row] for n, t in outcome.report.items()}, {n: t[row] for n, t in outcome.model.items()}
        for fault in planned_faults(self._here.config.faults, client, self._job.round, self._job.attempt):
            if fault.kind == "raise":
                return Single(place, None, error=f"planned fault of client {client} in round {self._job.round}")
            reply = spoil(fault, reply)
        # Copies: the rows share memory with the whole stack.
        report, model = ({n: a.copy() for n, a in arrays(part).items()} for part in reply[1:])
        return Single(place, reply[0], report, model)

    def _sum(self, start: int, span: int, parts: Sequence[_Part]) -> Tensors:
        """The node of a run, from the models of its clients."""
        held: dict[str, list[tuple[Sequence[int], Tensor]]] = {}
        for places, model in parts:
            mine = [place - start for place in places]
            for name, rows in model.items():
                held.setdefault(name, []).append((mine, padded(rows, self._model[name].shape)))
        weights = torch.zeros(span, dtype=torch.float64)
        for place, weight in zip(self._job.places, self._job.weights, strict=True):
            if start <= place < start + span:
                weights[place - start] = weight
        return run_sum(held, weights.to(self._here.device), min(span, self._job.leaf))


# -- measuring ----------------------------------------------------------------------------------------------------


def _measure(job: Measure, shared: Shared, here: Workspace) -> Measured:
    """Sums over the samples of a run of clients: the model is the same for all, so one pass does."""
    received, probes = _receive(shared, here)
    model, data = here.load(received), _together(here, job)
    if job.request is not None:
        return Measured(arrays(STATISTICS[job.request](model, data)))
    report, losses = evaluate_samples(model, data, probes)
    sizes = here.pool(job.split).sizes[list(job.clients)]
    home = torch.as_tensor(np.repeat(np.arange(len(sizes)), sizes), device=losses.device)
    per_client = torch.zeros(len(sizes), dtype=torch.float64, device=losses.device).index_add_(0, home, losses)
    return Measured(arrays(report), per_client.cpu().numpy())


def _together(here: Workspace, job: Measure) -> ClientData:
    """All samples of some clients as one; what a client does not own is absent."""
    pool, clients = here.pool(job.split), np.array(job.clients)
    starts, sizes = pool.starts[clients], pool.sizes[clients]
    if (starts[1:] == starts[:-1] + sizes[:-1]).all():
        rows: slice | Tensor = slice(int(starts[0]), int(starts[-1] + sizes[-1]))
    else:
        rows = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, sizes, strict=True)]).to(pool.y.device)
    x, present = {}, {}
    for m in pool.x:
        owner = np.array([m in pool.owned[k] for k in job.clients])
        if not owner[sizes > 0].any():
            continue
        x[m], present[m] = pool.x[m][rows], pool.present[m][rows]
        if not owner.all():
            present[m] = present[m] & torch.as_tensor(np.repeat(owner, sizes), device=present[m].device)
    return ClientData(x, present, pool.y[rows], pool.classes)


def _observe(job: Observe, shared: Shared, here: Workspace) -> tuple[Arrays, ...]:
    """What each client observes by itself: the figures of one cannot be told from sums over many."""
    received, given = _receive(shared, here)
    model = here.load(received)
    return tuple(arrays(observe(model, here.data(k, job.split), job.what, given)) for k in job.clients)


def _hello(job: Hello, shared: Shared, here: Workspace) -> tuple[ReplyHeader, ...]:
    """What every client says of itself."""
    pools = {split: here.pool(split) for split in SPLITS}
    counts = {split: pool.class_counts().tolist() for split, pool in pools.items()}
    return tuple(
        ReplyHeader(
            0,
            k,
            int(size),
            modalities=pools["train"].owned[k],
            info={"class_counts": {s: counts[s][k] for s in SPLITS}},
        )
        for k, size in enumerate(pools["train"].sizes)
    )


_WORK: Mapping[type, Callable[[Any, Shared, Workspace], Any]] = MappingProxyType(
    {Hello: _hello, Train: _train, Measure: _measure, Observe: _observe}
)
