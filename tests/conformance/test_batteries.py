"""Every built-in plug-in and a stranger's pass the batteries, and the batteries catch what they are for."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import sample_plugin
import tiny
import torch
from torch.nn import functional as F

from fedmm.config.presets import PRESETS
from fedmm.config.schema import Plugin
from fedmm.errors import ConfigError
from fedmm.objectives import OBJECTIVES, Objective, build_objective
from fedmm.objectives.joint import Joint
from fedmm.testing.objective import check_objective
from fedmm.testing.selector import check_selector
from fedmm.testing.strategy import check_strategy
from server.aggregation import blockwise_mean
from server.selection import SELECTORS, Pick, Selector, build_selector
from server.strategies import STRATEGIES, Strategy, build_strategy
from server.strategies.base import FedAvg

VARIANTS = [
    {"name": "prox", "mu": 1.0},
    {"name": "auxiliary", "weight": 0.5},
    {"name": "infiltration", "dominance": "round_global", "prox_mu": 0.1},
    {"name": "infiltration", "teacher": "local", "temperature": "off"},
    {"name": "infiltration", "lambda_self": 0.0},
    {"name": "infiltration", "lambda_cmi": 0.0},
    {"name": "infiltration", "warmup_rounds": 100},
    {"name": "prototypes", "variant": "v1"},
    {"name": "prototypes", "weak": "all"},
    {"name": "prototypes", "alpha": 0.0},
    {"name": "sample_plugin:Smoothed", "smoothing": 0.2},
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    check_objective(OBJECTIVES[name]())


@pytest.mark.parametrize("params", VARIANTS, ids=str)
def test_variants_of_objectives(params):
    check_objective(build_objective(Plugin(**params)))


@pytest.mark.parametrize("name", [*STRATEGIES, "sample_plugin:HalfStep"])
def test_strategies(name):
    check_strategy(build_strategy(Plugin(name=name)))


@pytest.mark.parametrize(
    "params",
    [
        *[{"name": n} for n in SELECTORS],
        {"name": "power_of_choice", "d": 3, "proportional": False},
        {"name": "divfl", "vectors": "encoders", "greedy": "plain"},
        {"name": "cmsfed", "theta": 1.0, "greedy": "plain", "normalize_delta": True},
        {"name": "cmsfed", "theta": 0.0, "candidates": 1},
        {"name": "sample_plugin:InTurn"},
    ],
    ids=str,
)
def test_selectors(params):
    check_selector(build_selector(Plugin(**params)))


def test_a_strangers_plugins_run_together(tmp_path):
    assert len(Path(sample_plugin.__file__).read_text().splitlines()) <= 30
    settings = tiny.config(
        "fedavg",
        objective__name="sample_plugin:Smoothed",
        objective__smoothing=0.3,
        strategy__name="sample_plugin:HalfStep",
        selection__name="sample_plugin:InTurn",
    )
    tiny.run(tmp_path, settings)
    assert {r: sorted(of) for r, of in tiny.selected(tmp_path).items()} == {1: [0, 1, 2], 2: [0, 1, 2]}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("sample_plugin:Nothing", "cannot import"),
        ("no_such_module:Nothing", "Python finds the module"),
        ("sample_plugin:InTurn", "not a subclass"),
        ("jiont", 'did you mean "joint"'),
    ],
)
def test_a_plugin_that_is_not_one(name, match):
    with pytest.raises(ConfigError, match=match):
        build_objective(Plugin(name=name))


@pytest.mark.parametrize("method", PRESETS)
def test_every_preset_names_what_exists(method):
    config = tiny.config(method)
    assert config.objective.name in OBJECTIVES
    assert config.strategy.name in STRATEGIES
    assert config.selection.name in SELECTORS


# What the batteries must catch ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadsHoles(Joint):
    def losses(self, model, batch, state):
        return (super().losses(model, batch, state)[0] + 1e-3 * batch.x[next(iter(batch.x))].nan_to_num().sum(),)


@dataclass(frozen=True)
class Branches(Joint):
    def losses(self, model, batch, state):
        (loss,) = super().losses(model, batch, state)
        return (loss * 2 if loss.item() > 0.5 else loss,)


@dataclass(frozen=True)
class GlobalDice(Joint):
    def losses(self, model, batch, state):
        return (super().losses(model, batch, state)[0] * torch.rand(()),)


@dataclass(frozen=True)
class NumpyDice(Joint):
    def begin(self, model, data, broadcast):
        return {"dice": torch.tensor(np.random.rand())}  # noqa: NPY002


@dataclass(frozen=True)
class ListState(Joint):
    def begin(self, model, data, broadcast):
        return {"numbers": [1, 2]}


@dataclass(frozen=True)
class ShortSampleState(Joint):
    def begin(self, model, data, broadcast):
        return {"sample.weight": torch.ones(3)}


@dataclass(frozen=True)
class TrainsMore(Joint):
    def trained_blocks(self, blocks, modalities):
        return tuple(b for b in blocks if b.startswith("head"))


@dataclass(frozen=True)
class MovesModel(Joint):
    def begin(self, model, data, broadcast):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return {}


@dataclass(frozen=True)
class NotAnumber(Joint):
    def end(self, model, data, state):
        return {"mean": torch.tensor(float("nan"))}


@dataclass(frozen=True)
class Undeclared(Joint):
    def end(self, model, data, state):
        return {"samples": torch.tensor(float(len(data)), dtype=torch.float64)}


@dataclass(frozen=True)
class TellsOfNothing(Joint):
    def actions(self, batch, state):
        return {"guided.a": torch.zeros(len(batch.y))}


@dataclass(frozen=True)
class TellsTooMuch(Joint):
    acts = frozenset({"guided"})

    def actions(self, batch, state):
        return {f"guided.{m}": torch.zeros(len(batch.y), 2) for m in batch.x}


@dataclass(frozen=True)
class WrongShape(Joint):
    def edit_gradients(self, gradients, parameters, state):
        return {n: g.flatten() for n, g in gradients.items()}


@dataclass(frozen=True)
class VectorLoss(Joint):
    def losses(self, model, batch, state):
        return (F.cross_entropy(model(batch.x, batch.present).logits, batch.y, reduction="none"),)


@dataclass(frozen=True)
class Remembers(Joint):
    calls: list = field(default_factory=list, hash=False, compare=False)

    def losses(self, model, batch, state):
        self.calls.append(1)
        return (super().losses(model, batch, state)[0] * len(self.calls),)


class Thawed(Objective):
    __dataclass_params__ = None


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (ReadsHoles, "absent samples are read"),
        (Branches, "several clients at once"),
        (GlobalDice, "global random generator"),
        (NumpyDice, "global random generator"),
        (ListState, "tensors keyed by name"),
        (ShortSampleState, "one row a training sample"),
        (TrainsMore, "not trained_blocks"),
        (MovesModel, "moves the model"),
        (NotAnumber, "not finite"),
        (Undeclared, "report_fields"),
        (TellsOfNothing, "not in acts"),
        (TellsTooMuch, "not one a sample"),
        (WrongShape, "changes the shape"),
        (VectorLoss, "not a scalar"),
        (Remembers, "two calls differ"),
        (Thawed, "frozen dataclass"),
    ],
)
def test_wrong_objectives_are_caught(wrong, match):
    with pytest.raises(AssertionError, match=match):
        check_objective(wrong())


@dataclass(frozen=True)
class Renames(FedAvg):
    def aggregate(self, model, updates, state, min_owners):
        new, state = super().aggregate(model, updates, state, min_owners)
        return {n: t.double() for n, t in new.items()}, state


@dataclass(frozen=True)
class FirstWins(Strategy):
    def aggregate(self, model, updates, state, min_owners):
        return model | updates[0].model, state


@dataclass(frozen=True)
class Grows(FedAvg):
    def aggregate(self, model, updates, state, min_owners):
        return blockwise_mean(model, updates), state | {f"round{len(state)}": torch.zeros(1)}


@dataclass(frozen=True)
class MovesUnowned(FedAvg):
    def aggregate(self, model, updates, state, min_owners):
        new, state = super().aggregate(model, updates, state, min_owners)
        return {n: t * 1.5 if t.is_floating_point() else t for n, t in new.items()}, state


@dataclass(frozen=True)
class InPlace(FedAvg):
    def aggregate(self, model, updates, state, min_owners):
        for u in updates:
            for t in u.model.values():
                t.mul_(2)
        return super().aggregate(model, updates, state, min_owners)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (Renames, "not torch.float32"),
        (FirstWins, "order of updates"),
        (Grows, "names change"),
        (MovesUnowned, "nobody trained it"),
        (InPlace, "changes what it was given"),
    ],
)
def test_wrong_strategies_are_caught(wrong, match):
    with pytest.raises(AssertionError, match=match):
        check_strategy(wrong())


@dataclass(frozen=True)
class Twice(Selector):
    def select(self, situation, count, rng):
        return [situation.everything(k) for k in situation.candidates[:1] * 2]


@dataclass(frozen=True)
class Strangers(Selector):
    def select(self, situation, count, rng):
        return [situation.everything(k) for k in range(min(count, len(situation.candidates)))]


@dataclass(frozen=True)
class Greedy(Selector):
    def select(self, situation, count, rng):
        return [situation.everything(k) for k in situation.candidates]


@dataclass(frozen=True)
class Unowned(Selector):
    def select(self, situation, count, rng):
        return [Pick(k, situation.federates.modalities) for k in situation.candidates[:count]]


@dataclass(frozen=True)
class OwnDice(Selector):
    def select(self, situation, count, rng):
        order = np.random.default_rng().permutation(len(situation.candidates))
        return [situation.everything(situation.candidates[i]) for i in order[:count]]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (Twice, "twice"),
        (Strangers, "no candidates"),
        (Greedy, "instead of"),
        (Unowned, "asks client"),
        (OwnDice, "other picks"),
    ],
)
def test_wrong_selectors_are_caught(wrong, match):
    with pytest.raises(AssertionError, match=match):
        check_selector(wrong())
