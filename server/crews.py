"""The short way to clients that live in processes of this machine: jobs for many of them instead of a message each.

It asks the same and gives the same as messages do (`server/session.py`), down to the metered bytes. Workers check and
add up the models where they arise; a client whose reply is not in order comes back by itself and is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fedmm.engines.grid import WorkingGrid
from fedmm.engines.work import LostJob
from fedmm.jobs import Hello, Measure, Measured, Observe, Shared, Single, Train, Trained, arrays, tensors
from fedmm.metrics.fields import stacked_fault
from fedmm.trees import Run, aligned
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, Terms
from server.admission import Expected, Refusal, admit_parts, check_header
from server.aggregation import Change, Update, merge_reports
from server.selection import Pick

MEASURED_TOGETHER = 64
"""Clients of one measuring job; a power of two, so that jobs cover nodes of the tree of sums."""

JOBS_PER_PROCESS = 4
"""So that nobody waits long for whoever has the last job; in short rounds a job costs more than that."""

SHORT_ROUND_S = 0.25
"""Seconds of training a process below which each process gets one job."""


@dataclass(frozen=True)
class Order:
    """What a round asks of some clients.

    Attributes:
        picks: Clients and modalities.
        places: Place of every picked client in the round's order.
        weights: Factor of each client's model in the sums.
        round: Round from 1; 0 is the bootstrap.
        attempt: How often these clients have been asked in the round.
        epochs: Local epochs.
        lr: Local learning rate.
        requests: Statistics wanted.
        deltas: Prefix of the tensors whose change is wanted; None: of none.
        each: The strategy needs every client's model.
        expected: What a client's reply must hold; the same object for clients that own and train the same.
        samples: Training samples of every client.
        deadline: Seconds to wait.
        terms: Of clients that have terms of their own.
        leaf: Places of a leaf of the tree of sums.
    """

    picks: Sequence[Pick]
    places: Mapping[int, int]
    weights: Mapping[int, float]
    round: int
    attempt: int
    epochs: int
    lr: float
    requests: tuple[str, ...]
    deltas: str | None
    each: bool
    expected: Callable[[Pick], Expected]
    samples: Sequence[int]
    deadline: float | None
    terms: Mapping[int, Terms] = field(default_factory=dict)
    leaf: int = 1


@dataclass
class Answers:
    """What came of an order."""

    updates: list[Update] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    sums: dict[Run, Tensors] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


class Crews:
    """Hands jobs to a grid's processes.

    Args:
        grid: A grid with a crew.
        spec: `client_spec` of the run.
        cohort: Clients in a stack.
        on_reply: Called with (clients done, clients asked).

    Attributes:
        cohort: As given; may be set anew before the first round, and changes no result.
        home: Folder where the clients' samples have been laid out, if they have.
        training: Seconds in forward, backward and update, over all processes.
    """

    def __init__(self, grid: WorkingGrid, spec: str, cohort: int, on_reply: Callable[[int, int], None]) -> None:
        self._grid, self._on_reply = grid, on_reply
        self._shared = Shared(spec, grid.home)
        self.home = grid.home
        self.cohort = cohort
        self.training = 0.0
        self._last = 0.0

    def hello(self) -> tuple[ReplyHeader, ...] | str:
        """What every client says of itself, or why they cannot."""
        ((_, said),) = self._grid.work([Hello()], self._shared)
        return said.reason if isinstance(said, LostJob) else said

    def train(
        self,
        order: Order,
        model: Tensors,
        broadcast: Tensors,
        personal: Callable[[tuple[str, ...], int], Tensors] | None = None,
    ) -> Answers:
        """Have clients train; everything is admitted or refused.

        Args:
            order: Who is to train what.
            model: Global model.
            broadcast: Server knowledge.
            personal: (owned modalities, client) -> what is sent to this client alone.
        """
        by_place = {order.places[p.client]: p for p in order.picks}
        answers, missing, before = Answers(), set(by_place), self.training
        shared = replace(self._shared, model=arrays(model), broadcast=arrays(broadcast))
        for job, result in self._grid.work(self._jobs(order, by_place, personal), shared, timeout=order.deadline):
            missing -= set(job.places)
            self._on_reply(len(by_place) - len(missing), len(by_place))
            if isinstance(result, LostJob):
                answers.refusals += [Refusal(k, "error", result.reason) for k in job.clients]
            else:
                self._take(job, result, by_place, order, answers)
        self._last = self.training - before
        answers.late = sorted(by_place[p].client for p in missing)
        return answers

    def _jobs(
        self,
        order: Order,
        by_place: Mapping[int, Pick],
        personal: Callable[[tuple[str, ...], int], Tensors] | None,
    ) -> list[Train]:
        places = sorted(by_place)
        # A retry finds the sums of its run made without it: it must come back by itself.
        each = order.each or order.attempt > 0
        short = 0 < self._last < SHORT_ROUND_S * self._grid.processes
        jobs_wanted = self._grid.processes * (1 if short else JOBS_PER_PROCESS)
        share = aligned(max(1, -(-(places[-1] + 1) // jobs_wanted)))
        span = max(self.cohort, order.leaf, share)
        jobs = []
        for start in range(0, places[-1] + 1, span):
            mine = [p for p in places if start <= p < start + span]
            if not mine:
                continue
            picks = [by_place[p] for p in mine]
            jobs.append(
                Train(
                    order.round,
                    order.attempt,
                    (start, span),
                    tuple(mine),
                    tuple(p.client for p in picks),
                    tuple(p.modalities for p in picks),
                    tuple(order.weights[p.client] for p in picks),
                    order.epochs,
                    order.lr,
                    order.requests,
                    order.deltas,
                    self.cohort,
                    order.leaf,
                    each,
                    tuple(order.terms.get(p.client, Terms()) for p in picks) if order.terms else (),
                    tuple(arrays(personal(order.expected(p).owned, p.client)) for p in picks) if personal else (),
                )
            )
        return jobs

    def _take(self, job: Train, result: Trained, by_place: Mapping[int, Pick], order: Order, answers: Answers) -> None:
        self.training += result.training
        for single in result.singles:
            answered = _judge(single, by_place[single.place], order)
            if isinstance(answered, Refusal):
                answers.refusals.append(answered)
            else:
                answers.updates.append(replace(answered, place=single.place, lr=order.lr))
        groups = [(group, tensors(group.report)) for group in result.groups]
        for group, report in groups:
            if reason := stacked_fault(report, order.expected(by_place[group.places[0]]).report):
                # The sums hold these clients' models too: all of the job are asked again, each by itself.
                answers.refusals += [Refusal(k, "report", reason) for k in job.clients]
                return
        if result.sums:
            answers.sums[job.run] = tensors(result.sums)
        for group, report in groups:
            deltas = tensors(group.deltas)
            columns = [t.unbind(0) for t in report.values()]
            rows = [dict(zip(report, row, strict=True)) for row in zip(*columns, strict=True)]
            picks = [by_place[place] for place in group.places]
            # All of a group own and train the same.
            expected, modalities = order.expected(picks[0]), picks[0].modalities
            complete = set(modalities) == set(expected.owned)
            for i, (pick, loss, steps) in enumerate(zip(picks, group.loss.tolist(), group.steps.tolist(), strict=True)):
                answers.updates.append(
                    Update(
                        pick.client,
                        order.samples[pick.client],
                        modalities,
                        {},
                        rows[i] if rows else {},
                        loss,
                        complete,
                        steps,
                        group.places[i],
                        group.blocks,
                        expected.held,
                        order.lr,
                    )
                )
            if deltas:
                answers.changes.append(Change(tuple(p.client for p in picks), deltas))

    def measure(
        self,
        split: str,
        clients: Sequence[int],
        model: Tensors,
        probes: Tensors,
        request: str | None,
        deadline: float | None = None,
    ) -> tuple[Tensors, dict[int, float]] | None:
        """Merged sums over the samples of clients, sorted, in one split, and the sum of losses of each client.

        Returns:
            None if a job was lost, or a sum is not finite: then messages tell whose fault it is.
        """
        shared = replace(self._shared, model=arrays(model), broadcast=arrays(probes))
        jobs = [Measure(split, run, request) for run in _runs(clients)]
        done: dict[tuple[int, ...], Measured] = {}
        for job, result in self._grid.work(jobs, shared, timeout=deadline):
            if isinstance(result, LostJob):
                return None
            done[job.clients] = result
            self._on_reply(sum(map(len, done)), len(clients))
        if len(done) < len(jobs):
            return None
        merged = merge_reports([tensors(done[job.clients].sums) for job in jobs])
        if not all(bool(torch.isfinite(t).all()) for t in merged.values()):
            return None
        losses = {
            k: float(loss)
            for run, result in done.items()
            if result.losses is not None
            for k, loss in zip(run, result.losses, strict=True)
        }
        return merged, losses

    def observe(
        self,
        split: str,
        clients: Sequence[int],
        model: Tensors,
        given: Tensors,
        what: tuple[str, ...],
        deadline: float | None = None,
    ) -> dict[int, Tensors] | None:
        """What each of some clients, sorted, observes on its samples of one split.

        Returns:
            None if a job was lost: then messages tell whose fault it is.
        """
        shared = replace(self._shared, model=arrays(model), broadcast=arrays(given))
        found: dict[int, Tensors] = {}
        jobs = [Observe(split, run, what) for run in _runs(clients)]
        for job, result in self._grid.work(jobs, shared, timeout=deadline):
            if isinstance(result, LostJob):
                return None
            found |= {k: tensors(report) for k, report in zip(job.clients, result, strict=True)}
            self._on_reply(len(found), len(clients))
        return {k: found[k] for k in clients} if len(found) == len(clients) else None


def _runs(clients: Sequence[int]) -> list[tuple[int, ...]]:
    """Sorted clients by the job that measures them."""
    runs: dict[int, list[int]] = {}
    for k in clients:
        runs.setdefault(k // MEASURED_TOGETHER, []).append(k)
    return [tuple(run) for run in runs.values()]


def _judge(single: Single, pick: Pick, order: Order) -> Update | Refusal:
    """The admission check of one client's own reply."""
    task = Task("", order.round, pick.client, pick.modalities)
    if single.header is None:
        return Refusal(pick.client, "error", single.error or "no reason given")
    parsed = check_header(single.header, task)
    if parsed is not None:
        return parsed
    return admit_parts(
        single.header,
        tensors(single.report),
        tensors(single.model),
        task,
        order.expected(pick),
        order.samples[pick.client],
    )
