"""Bytes that a run will send, block by block, before it is run: from the parcels and fields that the run itself meters.

What a client is sent and sends back depends on what it owns and trains, never on values. So bytes are known exactly
wherever the seed alone decides who trains what: under uniform selection, or if all clients own the same. Where what
is learned decides (another mixture of clients, modalities trained alone, blocks that a batch may lack), the same is
counted for clients picked at random, beside the least and the most that can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from fedmm import seeding
from fedmm.config.schema import Config
from fedmm.data.federation import Federation
from fedmm.metrics.fields import Fields, Sizes, evaluation_fields, statistics_fields
from fedmm.metrics.imbalance import observe_fields
from fedmm.models.blocks import block_of, blocks_of, bytes_per_block, modality_of, serves
from fedmm.objectives.watched import watched
from fedmm.types import Tensors
from server.aggregation import Update
from server.facts import Federates
from server.knowledge import KNOWLEDGE
from server.observatory import orders
from server.plan import Plan
from server.selection import Pick, Situation
from server.selection.submodular import CMSFed, DivFL
from server.selection.uniform import Uniform
from server.session import OBSERVATION, Parcel, Traffic

_FLOAT64 = 8


@dataclass(frozen=True)
class Volumes:
    """Bytes by block and direction.

    Attributes:
        bootstrap: Of round 0, if there is one.
        rounds: Of each round, evaluations and observations included.
        final: Of probes, validation and test at the end, which no round counts.
        least: Fewest bytes of a run without `final`, (down, up).
        most: Likewise the most.
        message: Bytes of a training message and of its reply, the mean over all rounds.
        exact: Whether nothing that the run finds out can change a byte.
        words: What the figures rest on, if not.
    """

    bootstrap: Traffic | None
    rounds: tuple[Traffic, ...]
    final: Traffic
    least: tuple[int, int]
    most: tuple[int, int]
    message: tuple[int, int]
    exact: bool
    words: tuple[str, ...]

    @cached_property
    def run(self) -> Traffic:
        """All rounds and the bootstrap: what summary.json counts."""
        total = Traffic()
        for part in [*([self.bootstrap] if self.bootstrap else []), *self.rounds]:
            _add(total, part)
        return total


@dataclass
class _Bounds:
    least: list[int] = field(default_factory=lambda: [0, 0])
    most: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, least: Sequence[int], most: Sequence[int]) -> None:
        for i in range(2):
            self.least[i] += least[i]
            self.most[i] += most[i]


def in_buffer(config: Config) -> int | None:
    """Replies that make a version of the model in buffered mode; None: rounds are synchronous."""
    devices = config.devices
    return devices.buffer.size if devices is not None and devices.mode == "buffered" else None


def volumes(prepared: Plan, federation: Federation) -> Volumes:
    """Count the bytes of a run in which every client answers at once."""
    ledger, bounds = _Ledger(prepared, federation), _Bounds()
    bootstrap = None
    if any(KNOWLEDGE[kind].bootstrap for kind in ledger.kinds):
        everybody = [ledger.whole(k) for k in ledger.candidates]
        bootstrap = ledger.training(everybody)
        ledger.bound(bounds, everybody, Traffic(), split=False)
        ledger.learn(everybody)
    rounds, trained, asked = [], Traffic(), 0
    train, evaluate = prepared.config.train, prepared.config.evaluate
    for round in range(1, train.rounds + 1):
        picks, traffic = ledger.select(round)
        if round % evaluate.every == 0 or round == train.rounds:
            _add(traffic, ledger.measuring("val"))
        if prepared.config.observe.due(round, train.rounds):
            _add(traffic, ledger.observation)
        ledger.watch = bool(prepared.objective.acts) and prepared.config.observe.watches(round, train.rounds)
        ledger.bound(bounds, picks, traffic, split=ledger.may_split)
        part = ledger.training(picks)
        _add(traffic, part)
        _add(trained, part)
        asked += len(picks)
        rounds.append(traffic)
        ledger.learn(picks)
    least, most = (bounds.least[0], bounds.least[1]), (bounds.most[0], bounds.most[1])
    if prepared.narrow:  # nobody is sent less than if all held the narrowest model
        narrowest = prepared.narrow_model(min(prepared.narrow))
        least = volumes(replace(prepared, model=narrowest, narrow={}), federation).least
    message = sum(trained.down.values()) // asked, sum(trained.up.values()) // asked
    words = ledger.words()
    exact = least == most and not words
    return Volumes(bootstrap, tuple(rounds), ledger.final(), least, most, message, exact, tuple(words))


class _Ledger:
    """Counts what `server.loop` and `server.session` would meter; knows nothing of values."""

    def __init__(self, prepared: Plan, federation: Federation) -> None:
        self.plan, self.federation = prepared, federation
        owned = tuple(federation.modalities(k, "train") for k in range(len(federation)))
        samples = tuple(len(rows) for rows in federation.indices["train"])
        self.federates = Federates(prepared.dataset.modalities, owned, samples)
        self.candidates = tuple(k for k, n in enumerate(samples) if n)
        self.model: Tensors = prepared.model.state_dict()
        self.kinds = prepared.objective.knowledge() | prepared.selector.knowledge() | prepared.strategy.needs
        self.requests = tuple(sorted({r for kind in self.kinds for r in KNOWLEDGE[kind].requests}))
        self._shown = {kind: KNOWLEDGE[kind](self.federates) for kind in sorted(prepared.objective.knowledge())}
        strategy = prepared.strategy
        state = strategy.begin(self.model, self.federates)
        self._sent_state = strategy.broadcast(state)
        self._personal = partial(strategy.personal, state) if strategy.records else None
        model = prepared.config.model
        self._sizes = Sizes(len(prepared.dataset.classes), model.features, model.unimodal_heads)
        self._buffered = in_buffer(prepared.config) is not None
        self._by_seed = not prepared.selector.knowledge() and not self._buffered
        self._everybody = prepared.config.train.clients_per_round >= len(self.candidates) and not self._buffered
        self._alike = len({owned[k] for k in self.candidates}) == 1
        self._asked_losses = False
        self._measured: dict[str, Traffic] = {}
        self.watch = False  # whether clients keep count of what the method does in the round
        self._costs: dict[tuple[tuple[str, ...], tuple[str, ...], int, bool], Traffic] = {}
        self._options: dict[tuple[tuple[str, ...], bool, int, bool], tuple[tuple[int, int], tuple[int, int]]] = {}

    def whole(self, client: int) -> Pick:
        """A client with all its modalities."""
        return Pick(client, self.federates.owned[client])

    # -- training ---------------------------------------------------------------------------------------------------

    def training(self, picks: Sequence[Pick]) -> Traffic:
        """What a round's picks are sent, and send."""
        total, broadcast = Traffic(), self._broadcast()
        for pick in picks:
            _add(total, self._cost(self.federates.owned[pick.client], pick.modalities, broadcast))
        return total

    def _broadcast(self) -> Tensors:
        known = {n: t for kind in self._shown.values() for n, t in kind.broadcast().items()}
        return known | self._sent_state

    def _cost(self, owned: tuple[str, ...], modalities: tuple[str, ...], broadcast: Tensors) -> Traffic:
        parcel = Parcel(self.model, broadcast, personal=self._personal)
        key = owned, modalities, _bytes(broadcast), self.watch
        if key not in self._costs:
            traffic, report = Traffic(), _fields_bytes(self._report(owned, modalities))
            traffic.add(traffic.down, parcel.size(owned))
            ways = self._ways(modalities)
            blocks = dict.fromkeys(b for way in ways for b in way)
            traffic.add(traffic.up, {b: sum(way.get(b, 0) for way in ways) // len(ways) for b in blocks})
            if report:
                traffic.add(traffic.up, {"report": report})
            if self.watch:
                both = watched(self.plan.objective).report_fields(modalities, self._sizes)
                own = self.plan.objective.report_fields(modalities, self._sizes)
                traffic.add(traffic.up, {OBSERVATION: _fields_bytes(both) - _fields_bytes(own)})
            self._costs[key] = traffic
        return self._costs[key]

    def _trained(self, modalities: tuple[str, ...]) -> Tensors:
        blocks = set(self.plan.objective.trained_blocks(blocks_of(self.model), modalities))
        return {n: t for n, t in self.model.items() if block_of(n) in blocks and serves(n, modalities)}

    def _ways(self, modalities: tuple[str, ...]) -> list[dict[str, int]]:
        """Bytes by block of each set of blocks of which a client chooses one to send."""
        size, objective = bytes_per_block(self._trained(modalities)), self.plan.objective
        optional = objective.optional_blocks(blocks_of(self.model), modalities)
        return [
            {b: n for b, n in size.items() if b not in optional or modality_of(b) in chosen}
            for chosen in objective.uploads(modalities)
        ]

    def _report(self, owned: tuple[str, ...], modalities: tuple[str, ...]) -> Fields:
        return statistics_fields(self.requests, owned, self._sizes) | self.plan.objective.report_fields(
            modalities, self._sizes
        )

    def learn(self, picks: Sequence[Pick]) -> None:
        """Bring knowledge to the size that it has after replies of these clients: one of each kind will do."""
        kinds = {(self.federates.owned[p.client], p.modalities): p for p in picks} if self._shown else {}
        updates = []
        for (owned, modalities), pick in kinds.items():
            fields = self._report(owned, modalities)
            report = {n: torch.zeros(f.shape, dtype=torch.float64) for n, f in fields.items()}
            samples = self.federates.samples[pick.client]
            updates.append(Update(pick.client, samples, modalities, {}, report, 0.0, modalities == owned))
        for known in self._shown.values():
            known.learn(self.model, updates)

    # -- selection --------------------------------------------------------------------------------------------------

    def select(self, round: int) -> tuple[list[Pick], Traffic]:
        """A round's picks, and what asking for losses costs; random ones where what was learned decides."""
        config, asked = self.plan.config, Traffic()
        count = in_buffer(config) or config.train.clients_per_round
        if self._buffered:  # where a client may come in twice
            rng = seeding.numpy_rng(config.seed, "selection", round)
            return [self.whole(int(k)) for k in rng.choice(self.candidates, count)], asked
        # Of clients that are all alike, or all picked, a selector that asks for nothing changes no byte.
        if (self._alike or self._everybody) and (not self._by_seed or (round > 1 and not self._asked_losses)):
            return [self.whole(k) for k in self.candidates[:count]], asked

        def losses(clients: Sequence[int]) -> Mapping[int, float]:
            self._asked_losses = True
            for k in clients:
                owned = self.federates.owned[k]
                asked.add(asked.down, Parcel(self.model).size(owned))
                asked.add(asked.up, {"report": _fields_bytes(evaluation_fields(owned, self._sizes, {}))})
            return dict.fromkeys(clients, 0.0)

        def own_losses(clients: Sequence[int]) -> Mapping[int, Mapping[str, float]]:
            self._asked_losses = True
            for k in clients:
                owned = self.federates.owned[k]
                fields = observe_fields(("losses",), owned, self.federates.modalities, self._sizes, {})
                asked.add(asked.down, Parcel(self.model).size(owned))
                asked.add(asked.up, {"report": _fields_bytes(fields)})
            return {k: dict.fromkeys(self.federates.owned[k], 0.0) for k in clients}

        situation = Situation(round, self.candidates, self.federates, {}, losses, own_losses)
        selector = self.plan.selector if self._by_seed else Uniform()
        return selector.select(situation, count, seeding.numpy_rng(config.seed, "selection", round)), asked

    def bound(self, bounds: _Bounds, picks: Sequence[Pick], fixed: Traffic, *, split: bool) -> None:
        """Add the least and the most that a round with as many picks can send, and `fixed` beside them.

        Args:
            bounds: What to add to.
            picks: The round's.
            fixed: What else the round sends.
            split: Whether a client may be made to train one of several modalities.
        """
        everybody = len(picks) == len(self.candidates) and not self._buffered
        known = everybody or (self._by_seed and not self._asked_losses)
        among = [p.client for p in picks] if known else self.candidates
        costs = [self._extremes(self.federates.owned[k], split) for k in among]
        sums = [sum(fixed.down.values()), sum(fixed.up.values())]
        least, most = list(sums), list(sums)
        for i in range(2):
            lowest, highest = sorted(low[i] for low, _ in costs), sorted((high[i] for _, high in costs), reverse=True)
            if self._buffered:
                lowest, highest = lowest[:1] * len(picks), highest[:1] * len(picks)
            least[i] += sum(lowest[: len(picks)])
            most[i] += sum(highest[: len(picks)])
        bounds.add(least, most)

    def _extremes(self, owned: tuple[str, ...], split: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Least and most bytes, (down, up), of a client that owns these."""
        broadcast = self._broadcast()
        key = owned, split, _bytes(broadcast), self.watch
        if key not in self._options:
            ways = [owned, *([(m,) for m in owned] if split else [])]
            found = []
            for way in ways:
                cost, choices = self._cost(owned, way, broadcast), [sum(w.values()) for w in self._ways(way)]
                rest = sum(n for b, n in cost.up.items() if b in ("report", OBSERVATION))
                ups = [rest + n for n in (*choices, min(choices) - self._optional(way))]
                found += [(sum(cost.down.values()), up) for up in ups]
            self._options[key] = tuple((f(d for d, _ in found), f(u for _, u in found)) for f in (min, max))  # type: ignore[assignment]
        return self._options[key]

    def _optional(self, modalities: tuple[str, ...]) -> int:
        """Bytes that a client keeps back if no batch has what they are for; what it chooses to is not among them."""
        if self._chooses(modalities):
            return 0
        blocks = set(self.plan.objective.optional_blocks(blocks_of(self.model), modalities))
        return sum(size for b, size in bytes_per_block(self._trained(modalities)).items() if b in blocks)

    def _chooses(self, modalities: tuple[str, ...]) -> bool:
        return len(self.plan.objective.uploads(modalities)) > 1

    @property
    def may_split(self) -> bool:
        """Whether the selector may have a client train one of several modalities."""
        selector = self.plan.selector
        if isinstance(selector, CMSFed):
            return math.isfinite(selector.theta)
        return bool(selector.knowledge()) and not isinstance(selector, DivFL)

    # -- measuring --------------------------------------------------------------------------------------------------

    def measuring(self, split: str, request: str | None = None, probes: Tensors | None = None) -> Traffic:
        """What measuring the model on a split takes."""
        key = f"{split} {request} {sorted(probes or {})}"
        if key not in self._measured:
            traffic = self._measured[key] = Traffic()
            parcel = Parcel(self.model, probes or {})
            for k, rows in enumerate(self.federation.indices[split]):
                if len(rows) == 0:
                    continue
                owned = self.federation.modalities(k, split)
                fields = (
                    evaluation_fields(owned, self._sizes, probes or {})
                    if request is None
                    else statistics_fields((request,), owned, self._sizes)
                )
                traffic.add(traffic.down, parcel.size(owned))
                traffic.add(traffic.up, {"report": _fields_bytes(fields)})
        return self._measured[key]

    @cached_property
    def observation(self) -> Traffic:
        """What one observation takes, under the one name that the run counts it as."""
        config, total = self.plan.config, Traffic()
        if not config.observe.on_model:
            return total
        given = orders(config, self.federates.modalities)
        if "accuracy" in config.observe.what and config.evaluate.probe:
            _add(total, self.measuring("train", "moments"))
            given |= self._probes()
        parcel = Parcel(self.model, given)
        for k, rows in enumerate(self.federation.indices[config.observe.split]):
            if len(rows):
                owned = self.federation.modalities(k, config.observe.split)
                fields = observe_fields(config.observe.on_model, owned, self.federates.modalities, self._sizes, given)
                total.add(total.down, parcel.size(owned))
                total.add(total.up, {"report": _fields_bytes(fields)})
        return Traffic({OBSERVATION: sum(total.down.values())}, {OBSERVATION: sum(total.up.values())})

    def _probes(self) -> Tensors:
        """Probes of the shape that they will have."""
        shape = self._sizes.features + 1, self._sizes.classes
        shown = {m for k in self.candidates for m in self.federates.owned[k]}
        return {f"probe.{m}": torch.zeros(shape, dtype=torch.float64) for m in sorted(shown)}

    def final(self) -> Traffic:
        """Probes, validation and test with the chosen model."""
        total, probes = Traffic(), Tensors()
        if self.plan.config.evaluate.probe:
            _add(total, self.measuring("train", "moments"))
            probes = self._probes()
        for split in ("val", "test"):
            _add(total, self.measuring(split, probes=probes))
        return total

    # -- words ------------------------------------------------------------------------------------------------------

    def words(self) -> list[str]:
        """What the figures rest on."""
        found, config = [], self.plan.config
        random = not (self._alike or self._everybody) and (not self._by_seed or self._asked_losses)
        if random:
            decides = "the queue of devices" if self._buffered else "what is learned"
            found.append(
                f"clients own different modalities and {decides} decides who trains: counted for a random pick"
            )
        if self.may_split and any(len(o) > 1 for o in self.federates.owned):
            found.append("exact if no client trains its weak modality alone; each one that does sends fewer blocks")
        if any(self._optional(self.federates.owned[k]) for k in self.candidates):
            found.append("exact if every client has batches of all its modalities; blocks of others are not sent")
        if any(self._chooses(self.federates.owned[k]) for k in self.candidates):
            found.append("which of its modalities a client sends is its own choice: counted by the mean of all choices")
        if config.faults:
            found.append("planned faults, and what is asked again because of them, are not counted")
        if self.plan.narrow:
            found.append("devices that hold a part of the model are counted as if they held all of it")
        if config.devices is not None and not self._buffered:
            found.append("every device answers: drop-outs, over-selection and late replies are not counted")
        return found


def _add(total: Traffic, part: Traffic) -> None:
    total.add(total.down, part.down)
    total.add(total.up, part.up)


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _fields_bytes(fields: Fields) -> int:
    return sum(_FLOAT64 * math.prod(f.shape) for f in fields.values())
