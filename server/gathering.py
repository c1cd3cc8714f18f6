"""Asking the clients of a round: orders with what a good reply must hold, admission, and asking again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedmm.config.schema import TrainConfig
from fedmm.engines.costs import multiplications
from fedmm.metrics.fields import Sizes, statistics_fields
from fedmm.models import blocks_of
from fedmm.models.blocks import block_of, serves
from fedmm.models.width import corner
from fedmm.objectives.watched import METHOD, watched
from fedmm.trees import leaf_span
from fedmm.types import Tensors
from fedmm.wire import Terms
from server.admission import Expected
from server.aggregation import Gathered
from server.crews import Answers, Order
from server.facts import Federates, Knowledge
from server.places import Size, arrange, cohort_size
from server.plan import Plan
from server.policy import Policy
from server.selection import Pick
from server.session import Parcel, Session


def learning_rate(train: TrainConfig, round: int) -> float:
    """Local learning rate of a round (from 1): constant, or the papers' hold and linear decay."""
    if train.lr_schedule == "constant" or round <= train.lr_hold:
        return train.lr
    return train.lr - (train.lr - train.lr_min) * round / train.rounds


def sizes_of(plan: Plan) -> Sizes:
    """What the shapes of reports depend on."""
    model = plan.config.model
    return Sizes(len(plan.dataset.classes), model.features, model.unimodal_heads)


_NO_TERMS = Terms()


class _Sizes(dict[tuple[str, ...], Size]):
    """Modalities -> how large the model is that serves them, found out when first asked for."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    def __missing__(self, modalities: tuple[str, ...]) -> Size:
        model = self._plan.model
        mine = [t.numel() for n, t in model.state_dict().items() if serves(n, modalities)]
        self[modalities] = Size(sum(mine), multiplications(model, self._plan.dataset.specs, modalities), len(mine))
        return self[modalities]


class Collector:
    """Asks clients to train, admits what comes, and asks again as the policy says.

    Args:
        plan: The run.
        session: The line to the clients.
        policy: What to do with refusals.
        federates: Facts of the federation.
        knowledge: Kinds of knowledge that updates must bring something for.
        terms: Of clients that have terms of their own.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        policy: Policy,
        federates: Federates,
        knowledge: Mapping[str, Knowledge],
        terms: Mapping[int, Terms],
    ) -> None:
        self._plan, self._session, self._policy, self._federates = plan, session, policy, federates
        self._requests = tuple(sorted({r for k in knowledge.values() for r in k.requests}))
        self._deltas = min((k.deltas for k in knowledge.values() if k.deltas is not None), key=len, default=None)
        self._cohort = cohort_size(plan.config)
        self._sizes = _Sizes(plan)
        self.terms = terms

    def collect(
        self,
        picks: Sequence[Pick],
        round: int,
        epochs: int,
        parcel: Parcel,
        *,
        terms: Mapping[int, Terms] | None = None,
        each: bool = False,
    ) -> Gathered:
        """The admitted updates of some clients.

        Args:
            picks: Who trains what; every client at most once.
            round: Round from 1; 0 is the bootstrap.
            epochs: Local epochs of who has no terms.
            parcel: What they start from.
            terms: Instead of the collector's own.
            each: Every update shall hold its model.
        """
        strategy, policy, train = self._plan.strategy, self._plan.config.policy, self._plan.config.train
        watch = round > 0 and bool(self._plan.objective.acts) and self._plan.config.observe.watches(round, train.rounds)
        terms, samples = self.terms if terms is None else terms, self._federates.samples
        if round == 0:  # the bootstrap is one epoch for everybody
            terms = {k: replace(own, epochs=None) for k, own in terms.items()}
        picks = sorted(picks, key=lambda p: p.client)
        own = [terms.get(p.client, _NO_TERMS) for p in picks]
        passes = np.array([t.epochs or epochs for t in own], dtype=np.int64)
        batch = np.array([t.batch_size or train.batch_size for t in own], dtype=np.int64)
        sizes = np.array([samples[p.client] for p in picks], dtype=np.int64)
        steps = passes * -(-sizes // batch)
        order = Order(
            picks=picks,
            places=arrange(
                picks,
                steps,
                passes * sizes,
                self._sizes,
                self._cohort,
                halved=self._plan.config.engine.device == "cpu",
            ),
            weights={
                p.client: strategy.weight(n, s) for p, n, s in zip(picks, sizes.tolist(), steps.tolist(), strict=True)
            },
            round=round,
            attempt=0,
            epochs=epochs,
            lr=learning_rate(train, max(round, 1)),
            requests=(*self._requests, METHOD) if watch else self._requests,
            deltas=self._deltas,
            each=each or strategy.reads_models or policy.max_update_norm is not None,
            expected=self.expectations(parcel.model, watch=watch),
            samples=samples,
            deadline=policy.deadline_s,
            terms=terms,
            leaf=leaf_span(sum(t.numel() for t in parcel.model.values()), self._cohort),
        )
        whole = Answers()
        while order.picks:
            answers = self._session.train(order, parcel)
            for client in answers.late:
                self._policy.late(client, round)
            again = {r.client for r in answers.refusals if self._policy.refused(r, round, order.attempt)}
            for update in answers.updates:
                self._policy.admitted(update.client)
            whole.updates += answers.updates
            whole.sums |= answers.sums
            whole.changes += answers.changes
            order = replace(order, picks=[p for p in order.picks if p.client in again], attempt=order.attempt + 1)
        updates = tuple(sorted(whole.updates, key=lambda u: u.client))
        return Gathered(updates, whole.sums, tuple(whole.changes), order.leaf)

    def expectations(self, model: Tensors, *, watch: bool = False) -> Callable[[Pick], Expected]:
        """What the reply of each picked client must hold; the same for clients that own and train the same."""
        objective = watched(self._plan.objective) if watch else self._plan.objective
        every, size = blocks_of(model), sizes_of(self._plan)
        kinds: dict[tuple[tuple[str, ...], tuple[str, ...], int | None], Expected] = {}

        def expected(pick: Pick) -> Expected:
            owned, width = self._federates.owned[pick.client], self.terms_of(pick.client).width
            kind = owned, pick.modalities, width
            if kind not in kinds:
                blocks = set(objective.trained_blocks(every, pick.modalities))
                mine = {n: t for n, t in model.items() if block_of(n) in blocks and serves(n, pick.modalities)}
                held = {} if width is None else self._plan.narrow[width]
                kinds[kind] = Expected(
                    corner(mine, held),
                    statistics_fields(self._requests, owned, size) | objective.report_fields(pick.modalities, size),
                    owned,
                    self._plan.config.policy.max_update_norm,
                    frozenset(objective.optional_blocks(every, pick.modalities)),
                    held,
                )
            return kinds[kind]

        return expected

    def terms_of(self, client: int) -> Terms:
        """A client's own terms."""
        return self.terms.get(client, _NO_TERMS)
