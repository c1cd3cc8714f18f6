"""The round loop: select -> send -> collect -> admit -> aggregate -> evaluate -> checkpoint -> notify.

With `devices`, simulated time (`server.timing`) decides between select and send whose replies will count; in buffered
mode (`server.asynchronous`) a round is the making of one model version, and an event queue says who is in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flwr.serverapp import Grid

from fedmm import seeding
from fedmm.errors import RunError
from fedmm.io.checkpoint import Checkpoint, save_checkpoint
from fedmm.io.files import weights_sha256
from fedmm.io.run_directory import Row, RunDirectory
from fedmm.metrics.fields import Fields, evaluation_fields, statistics_fields
from fedmm.types import Tensors
from server.aggregation import Gathered, Update
from server.asynchronous import Asynchronous, buffered_mean
from server.callbacks import Callback, RoundReport
from server.gathering import Collector, learning_rate, sizes_of
from server.knowledge import KNOWLEDGE, Knowledge
from server.measure import figure_rows, figures, fit_probes, sources
from server.observatory import Observatory, method_rows
from server.places import cohort_size
from server.plan import Plan
from server.policy import Policy
from server.selection import Pick, Situation
from server.session import Parcel, Session
from server.timing import Timing

__all__ = ["Server", "learning_rate"]


class Server:
    """One federated run on any grid.

    Args:
        plan: What to run.
        grid: Where clients are.
        directory: Where results go, and the checkpoint to go on from.
        callbacks: Who is told.
    """

    def __init__(self, plan: Plan, grid: Grid, directory: RunDirectory, callbacks: Sequence[Callback] = ()) -> None:
        self.plan, self.config = plan, plan.config
        self.directory, self.callbacks = directory, tuple(callbacks)
        self.session = Session(grid, plan.spec, plan.config.scenario.clients, self._replied, cohort_size(plan.config))
        self.policy = Policy(plan.config.policy)
        self.model: Tensors = {n: t.detach().clone() for n, t in plan.model.state_dict().items()}
        self.state: Tensors = {}
        self.knowledge: dict[str, Knowledge] = {}
        self.timing: Timing | None = None
        self.asynchronous: Asynchronous | None = None
        self.best: tuple[float, int, Tensors] = (-1.0, 0, {})
        self._recorded = 0
        self.totals: dict[str, float] = dict.fromkeys(
            ("bytes_up", "bytes_down", "replies_expected", "replies_used", "seconds"), 0
        )

    def run(self) -> dict[str, Any]:
        """Run all rounds that are left, test once, and return the summary.

        Raises:
            RunError: Clients are missing, or a round fell short under a strict policy.
        """
        began = time.monotonic() - self._connect()
        self._tell("started", self.round + 1, self.config.train.rounds)
        if self.round < 0:
            self._bootstrap()
        validation: dict[str, Any] | None = None
        while self.round < self.config.train.rounds:
            start = time.monotonic()
            rows, validation = self._round(self.round + 1)
            self.totals["seconds"] = time.monotonic() - began
            self._close_round(self.round + 1, rows)
            self._tell(
                "finished_round",
                RoundReport(self.round, self.config.train.rounds, rows, validation, time.monotonic() - start),
            )
        summary = self._finish(began)
        self._tell("ended", summary)
        return summary

    # -- beginning ----------------------------------------------------------------------------------------------

    def _connect(self) -> float:
        """Meet the clients, take up the checkpoint; return the seconds that earlier sessions spent."""
        self.federates, hellos = self.session.connect(self.plan.dataset.modalities)
        self._sizes = {
            split: {k: sum(h.info["class_counts"][split]) for k, h in hellos.items()}
            for split in ("train", "val", "test")
        }
        self._observatory = Observatory(self.plan, self.session, self.policy, self.federates, self._sizes)
        for name in sorted(self._wanted()):
            self.knowledge[name] = KNOWLEDGE[name](self.federates)
            self.knowledge[name].prepare(self.plan.objective, self.model)
        self.state = self.plan.strategy.begin(self.model, self.federates)
        self._keep_time()
        self.round = -1 if any(k.bootstrap for k in self.knowledge.values()) else 0
        if self.directory.checkpoint is not None:
            self._restore(self.directory.checkpoint)
        counts = {s: [hellos[k].info["class_counts"][s] for k in sorted(hellos)] for s in self._sizes}
        self.directory.update_manifest(
            {
                "data": {"name": self.plan.dataset.name, "sha256": self.plan.dataset.sha256},
                "federation": {
                    "classes": list(self.plan.dataset.classes),
                    "modalities": list(self.federates.modalities),
                    "owned": [list(o) for o in self.federates.owned],
                    "class_counts": counts,
                },
            }
        )
        return self.totals["seconds"]

    def _keep_time(self) -> None:
        """Set up who asks the clients, and with `devices` the clock and the event queue."""
        plan, devices, federates = self.plan, self.config.devices, self.federates
        self.timing = None if devices is None else Timing(plan, devices, federates.samples)
        terms = {} if self.timing is None else self.timing.terms
        self._collector = Collector(plan, self.session, self.policy, federates, self.knowledge, terms)
        if devices is not None and self.timing is not None and devices.mode == "buffered":
            self.asynchronous = Asynchronous(plan, devices, self._collector, self.timing, federates, self._parcel())

    def _wanted(self) -> frozenset[str]:
        return self.plan.objective.knowledge() | self.plan.selector.knowledge() | self.plan.strategy.needs

    def _bootstrap(self) -> None:
        """Round 0: every client reports on the initial model and trains one epoch; the model does not move."""
        picks = [
            Pick(k, self.federates.owned[k]) for k in range(len(self.federates.owned)) if self.federates.samples[k]
        ]
        updates = self._collect(picks, 0, epochs=1)
        self._enough(len(picks), len(updates), 0)
        for known in self.knowledge.values():
            known.learn(self.model, updates)
        rows = self._traffic_rows(0)
        if self.timing is not None:
            rows += self.timing.bootstrap(picks, self._parcel(), self._collector.expectations(self.model))
        self._close_round(0, rows)

    # -- one round ----------------------------------------------------------------------------------------------

    def _round(self, round: int) -> tuple[list[Row], dict[str, Any] | None]:
        self.session.traffic.down.clear()
        self.session.traffic.up.clear()
        rows = self._advance(round) if self.asynchronous is None else self._advance_buffered(round, self.asynchronous)
        for known in self.knowledge.values():
            rows += [Row(round, "train", "global", None, m, n, v) for (m, n), v in known.metrics().items()]
        validation = None
        if round % self.config.evaluate.every == 0 or round == self.config.train.rounds:
            validation = self._evaluate(self.model, "val", round)
            rows += figure_rows(round, "val", validation)
            if self.timing is not None:
                self.timing.validated(validation["accuracy"])
            if validation["accuracy"] > self.best[0] and self.config.evaluate.choose == "best":
                self.best = (validation["accuracy"], round, self.model)
        if self.config.observe.due(round, self.config.train.rounds):
            rows += self._observatory.look(round, self.model, rows)
        return rows + self._traffic_rows(round), validation

    def _advance(self, round: int) -> list[Row]:
        """One synchronous round: a new model from the replies of those who were picked."""
        sent, wanted, rows = self.model, self.config.train.clients_per_round, list[Row]()
        if self.timing is None:
            picks = self._select(round)
            wanted = len(picks)
        else:
            wanted = min(wanted, len(self._candidates(round)))
            there, count = self.timing.candidates(self._candidates(round), wanted)
            picks = self._select(round, there, count)
            expected = self._collector.expectations(sent)
            picks, events, rows = self.timing.round(picks, wanted, round, self._parcel(), expected)
            self.policy.events += events
        updates = self._collect(picks, round, self.config.train.local_epochs)
        self.totals["replies_expected"] += wanted
        if self._enough(wanted, len(updates), round):
            least = self.config.policy.min_owners
            self.model, self.state = self.plan.strategy.aggregate(sent, updates, self.state, least)
            self._learn(sent, updates)
        return self._training_rows(round, updates) + rows

    def _advance_buffered(self, round: int, queue: Asynchronous) -> list[Row]:
        """One version of the model from a full buffer."""
        sent, step = self.model, queue.advance(self._parcel())
        self.policy.events += step.events
        self.totals["replies_expected"] += step.asked
        if self._enough(step.asked, len(step.updates), round):
            self.model = buffered_mean(sent, step.buffer, self.config.policy.min_owners)
            self._learn(sent, step.updates)
        return self._training_rows(round, step.updates) + step.rows

    def _learn(self, sent: Tensors, updates: Gathered) -> None:
        """Take in a round's updates, which have just made the next model."""
        for known in self.knowledge.values():
            known.learn(sent, updates)
            self.model = known.amend(self.model)
        self.totals["replies_used"] += len(updates)

    def _candidates(self, round: int) -> tuple[int, ...]:
        return tuple(k for k, n in enumerate(self.federates.samples) if n > 0 and self.policy.allowed(k, round))

    def _select(self, round: int, candidates: Sequence[int] | None = None, count: int | None = None) -> list[Pick]:
        """Picks among the clients that may take part, or among `candidates`."""
        among = self._candidates(round) if candidates is None else tuple(candidates)
        situation = Situation(
            round,
            among,
            self.federates,
            self.knowledge,
            lambda ks: self._losses(ks, round),
            lambda ks: self._observatory.own_losses(ks, round, self.model),
        )
        rng = seeding.numpy_rng(self.config.seed, "selection", round)
        return self.plan.selector.picks(situation, count or self.config.train.clients_per_round, rng)

    def _collect(self, picks: Sequence[Pick], round: int, epochs: int) -> Gathered:
        return self._collector.collect(picks, round, epochs, self._parcel())

    def _parcel(self) -> Parcel:
        strategy, state = self.plan.strategy, self.state
        personal = partial(strategy.personal, state) if strategy.records else None
        return Parcel(self.model, self._broadcast(), self.plan.narrow, personal)

    def _enough(self, asked: int, used: int, round: int) -> bool:
        """The policy's verdict on a round; the events that led to it are on record even if it ends the run."""
        try:
            return self.policy.enough(asked, used, round)
        except RunError:
            self._record_events()
            raise

    def _broadcast(self) -> Tensors:
        wanted = self.plan.objective.knowledge()
        known = {n: t for k in sorted(wanted) for n, t in self.knowledge[k].broadcast().items()}
        return known | self.plan.strategy.broadcast(self.state)

    # -- measuring ----------------------------------------------------------------------------------------------

    def _query(self, split: str, round: int, model: Tensors, broadcast: Tensors, request: str | None = None) -> Tensors:
        """Merged sums of all clients that have samples in the split."""
        clients, owned = sources(self.config.scenario, self.federates, self._sizes[split], split)

        def fields(o: tuple[str, ...]) -> Fields:
            if request is None:
                return evaluation_fields(o, sizes_of(self.plan), broadcast)
            return statistics_fields((request,), o, sizes_of(self.plan))

        merged, _, bad = self.session.measure(
            split, clients, owned, Parcel(model, broadcast), fields, request, round, self.config.policy.deadline_s
        )
        self.policy.left_out(bad, round, split)
        return merged

    def _evaluate(self, model: Tensors, split: str, round: int, probes: Tensors | None = None) -> dict[str, Any]:
        return figures(self._query(split, round, model, probes or {}), self.federates.modalities)

    def _losses(self, clients: Sequence[int], round: int) -> Mapping[int, float]:
        """Mean loss of the global model on the training data of some clients (power-of-choice)."""
        clients = sorted(clients)
        owned = [self.federates.owned[k] for k in clients]
        _, losses, _ = self.session.measure(
            "train",
            clients,
            owned,
            Parcel(self.model),
            lambda o: evaluation_fields(o, sizes_of(self.plan), {}),
            None,
            round,
        )
        return {k: loss / self.federates.samples[k] for k, loss in losses.items()}

    def _training_rows(self, round: int, updates: Sequence[Update]) -> list[Row]:
        total = sum(u.samples for u in updates)
        rows = [Row(round, "train", "global", None, "fused", "lr", learning_rate(self.config.train, round))]
        if total:
            loss = sum(u.loss * u.samples for u in updates) / total
            rows.append(Row(round, "train", "global", None, "fused", "loss", loss))
        trained = Counter(u.modalities for u in updates)
        for m in self.federates.modalities:
            clients = float(sum(count for kind, count in trained.items() if m in kind))
            rows.append(Row(round, "train", "global", None, m, "clients_trained", clients))
        for u in updates:
            client = u.client
            for m in u.modalities:
                rows.append(Row(round, "train", "client", client, m, "selected", 1.0))
            rows.append(Row(round, "train", "client", client, "fused", "samples", float(u.samples)))
            rows.append(Row(round, "train", "client", client, "fused", "loss", u.loss))
        return rows + method_rows(round, updates, self.federates.modalities)

    def _traffic_rows(self, round: int) -> list[Row]:
        rows = []
        for metric, parts in (("bytes_down", self.session.traffic.down), ("bytes_up", self.session.traffic.up)):
            rows += [Row(round, "train", "block", None, block, metric, float(n)) for block, n in sorted(parts.items())]
        return rows

    # -- keeping ------------------------------------------------------------------------------------------------

    def _close_round(self, round: int, rows: list[Row]) -> None:
        """Record, checkpoint, and only then count the round as done."""
        self.totals["bytes_up"] += sum(self.session.traffic.up.values())
        self.totals["bytes_down"] += sum(self.session.traffic.down.values())
        self.directory.append(rows)
        self._record_events()
        if round % self.config.checkpoint.every == 0 or round == self.config.train.rounds:
            save_checkpoint(self.directory.checkpoints, self._checkpoint(round), self.config.checkpoint.keep)
        self.round = round

    def _record_events(self) -> None:
        """Write the policy's events to the manifest, if there are new ones."""
        if len(self.policy.events) != self._recorded:
            self.directory.update_manifest({"events": [e.record() for e in self.policy.events]})
            self._recorded = len(self.policy.events)

    def _checkpoint(self, round: int) -> Checkpoint:
        tensors = {f"model/{n}": t for n, t in self.model.items()}
        tensors |= {f"strategy/{n}": t for n, t in self.state.items()}
        for kind, known in self.knowledge.items():
            tensors |= {f"knowledge/{kind}/{n}": t for n, t in known.tensors.items()}
        tensors |= {f"best/{n}": t for n, t in self.best[2].items()}
        values = {"totals": self.totals, "best": list(self.best[:2]), "policy": self.policy.state()}
        if self.timing is not None:
            values["timing"] = self.timing.state()
        if self.asynchronous is not None:
            values["queue"] = self.asynchronous.state()
            tensors |= {f"version/{n}": t for n, t in self.asynchronous.tensors().items()}
        return Checkpoint(round, tensors, values)

    def _restore(self, checkpoint: Checkpoint) -> None:
        def part(prefix: str) -> Tensors:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        self.model, self.state = part("model/"), part("strategy/")
        for kind, known in self.knowledge.items():
            known.tensors = part(f"knowledge/{kind}/")
        score, round = checkpoint.values["best"]
        self.best = (score, round, part("best/"))
        self.totals = dict(checkpoint.values["totals"])
        self.policy.restore(checkpoint.values["policy"])
        if self.timing is not None:
            self.timing.restore(checkpoint.values["timing"])
        if self.asynchronous is not None:
            self.asynchronous.restore(checkpoint.values["queue"], part("version/"))
        self.round = checkpoint.round

    def _finish(self, began: float) -> dict[str, Any]:
        """Meet the test data, once, with the chosen model."""
        config, rounds = self.config, self.config.train.rounds
        chosen = self.best[1] if config.evaluate.choose == "best" else rounds
        model = self.best[2] if config.evaluate.choose == "best" else self.model
        probes = {}
        if config.evaluate.probe:
            sums = self._query("train", rounds, model, {}, "moments")
            probes = fit_probes(sums, self.federates.modalities)
        validation = self._evaluate(model, "val", rounds, probes)
        test = self._evaluate(model, "test", rounds, probes)
        self.directory.append(figure_rows(rounds, "test", test))
        self._record_events()
        short = self.totals["replies_used"] < self.totals["replies_expected"]
        gap = test.pop("modality_gap")
        validation.pop("modality_gap")
        return {
            "status": "degraded" if short else "completed",
            "method": config.method or "custom",
            "data": self.plan.dataset.name,
            "seed": config.seed,
            "rounds": rounds,
            "chosen_round": chosen,
            "val": validation,
            "test": test,
            "modality_gap": gap,
            "bytes_up": int(self.totals["bytes_up"]),
            "bytes_down": int(self.totals["bytes_down"]),
            "seconds": round_seconds(time.monotonic() - began),
            "replies_expected": int(self.totals["replies_expected"]),
            "replies_used": int(self.totals["replies_used"]),
            "events": len(self.policy.events),
            "weights_sha256": weights_sha256(self.model),
            "engine": config.engine.name,
            "parameters": sum(t.numel() for t in self.model.values()),
        } | ({} if self.timing is None else self.timing.summary())

    def _replied(self, done: int, asked: int) -> None:
        self._tell("replied", done, asked)

    def _tell(self, what: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(*args)


def round_seconds(seconds: float) -> float:
    """Seconds to the millisecond."""
    return round(seconds, 3)
