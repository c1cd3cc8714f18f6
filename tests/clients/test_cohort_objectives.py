"""Every objective that stacks: clients trained together end where each ends alone, to 1e-12 of its weights (float64).

Clients differ in samples, steps, local epochs and batch size; samples lack modalities and hold NaN there. Every other
objective says why its clients train one by one.
"""

import boosting
import numpy as np
import pytest
import tiny
import torch

from clients.cohort import Member, train_stack
from clients.trainer import LocalSchedule, train
from fedmm import seeding
from fedmm.config.schema import Plugin
from fedmm.data.federation import Pool
from fedmm.models.blocks import block_of, blocks_of
from fedmm.models.stacked import Stack
from fedmm.objectives import OBJECTIVES, build_objective
from fedmm.objectives.mla import Alternating
from fedmm.objectives.watched import watched

MODALITIES = tiny.names(3)
SIZES = (13, 26, 9, 17)
OWNED = {"all": MODALITIES, "two": ("m1", "m3"), "one": ("m2",)}
ROUND = 6
SCHEDULES = [LocalSchedule(1 + k % 3, 6 + k, 0.05, 0.9, 1e-3, clip=0.7) for k in range(len(SIZES))]
PLAIN = [LocalSchedule(2, 8, 0.05, 0.0, 0.0)] * len(SIZES)
VARIANTS = [
    {"name": "prox", "mu": 0.5},
    {"name": "infiltration", "dominance": "round_global", "prox_mu": 0.1},
    {"name": "infiltration", "teacher": "local"},
    {"name": "prototypes", "variant": "v1"},
    {"name": "prototypes", "weak": "all"},
    {"name": "negative", "guide": "global", "competitor": "per_modality", "reduction": "code", "extra": True},
    {"name": "mmpareto", "solve": "tensor"},
    {"name": "mla", "project": False},
    {"name": "gblend", "held_out": 0.3},
    {"name": "moon", "level": "modality"},
    {"name": "ogm", "reference": "others", "enhance": False},
    {"name": "boosting", "every": 3},
    {"name": "arm", "head": "trained"},
    {"name": "mfedmc", "alpha_s": 0.0, "alpha_c": 0.0, "gamma": 2},
]
CASES = [{"name": n} for n, kind in OBJECTIVES.items() if kind.stacks] + VARIANTS


def pool(owned, whole=False):
    missing = 0.0 if whole else 0.3
    clients = [tiny.data(MODALITIES, n, seed, missing).only(owned) for seed, n in enumerate(SIZES)]
    return Pool(
        {m: torch.cat([c.x[m] for c in clients]) for m in owned},
        {m: torch.cat([c.present[m] for c in clients]) for m in owned},
        torch.cat([c.y for c in clients]),
        np.cumsum(SIZES) - np.array(SIZES),
        np.array(SIZES),
        tiny.CLASSES,
        frozenset(owned if whole else ()),
        (owned,) * len(SIZES),
    )


def knowledge(model):
    """Whatever any objective may want to be sent; the round is one of decisions for `every: 3`."""
    generator = seeding.torch_rng(0, "knowledge")
    sent = {"round": torch.tensor(ROUND), "dominant": torch.tensor(2)}
    for m in MODALITIES:
        sent[f"prototype.{m}"] = torch.randn(tiny.CLASSES, tiny.FEATURES, generator=generator, dtype=torch.float64)
        sent[f"prototype_count.{m}"] = torch.tensor([2.0, 0.0, 1.0, 4.0])
        sent[f"arm.strong.{m}"], sent[f"arm.share.{m}"] = torch.tensor(float(m == "m3")), torch.tensor(0.5)
        sent[f"arm.span.{m}"] = torch.randn(tiny.FEATURES + 1, tiny.FEATURES, generator=generator, dtype=torch.float64)
    sent["arm.weight"] = torch.randn(tiny.FEATURES, tiny.CLASSES, generator=generator, dtype=torch.float64)
    for k, branch in enumerate(("fused", *MODALITIES)):
        sent[f"blend.{branch}"] = torch.tensor(0.1 * (k + 1), dtype=torch.float64)
    for n, t in model.state_dict().items():
        sent[f"model.{n}"] = t + 0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
    return sent


def network(objective):
    if "boosting" in objective.requires:
        return boosting.network(MODALITIES)
    fusion = "sum" if isinstance(objective, Alternating) else "concat"
    fusion = "late" if "late_fusion" in objective.requires else fusion
    return tiny.model(MODALITIES, 0, 2 if "projector" in objective.requires else None, fusion=fusion)


def assert_equal(ours, reference, name, tolerance):
    assert ours.shape == reference.shape, name
    scale = max(1.0, float(reference.abs().max())) if reference.numel() else 1.0
    gap = float((ours - reference).abs().max()) if reference.numel() else 0.0
    assert gap <= tolerance * scale, f"{name} differs by {gap:.3g}"


@pytest.mark.parametrize("owned", OWNED)
@pytest.mark.parametrize("params", CASES, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_together_as_alone(params, owned):
    compare(params, owned, SCHEDULES)


@pytest.mark.parametrize("owned", ["all", "one"])
@pytest.mark.parametrize("params", CASES, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_together_as_alone_where_nothing_is_missing(params, owned):
    compare(params, owned, SCHEDULES, whole=True)


def test_without_momentum_decay_and_clipping():
    compare({"name": "joint"}, "all", PLAIN)


@pytest.mark.parametrize("name", [n for n, kind in OBJECTIVES.items() if kind.stacks])
def test_together_as_alone_in_single_precision(name):
    compare({"name": name}, "all", SCHEDULES, torch.float32, 1e-5)


@pytest.mark.parametrize("owned", ["all", "one"])
@pytest.mark.parametrize("name", [n for n, kind in OBJECTIVES.items() if kind.stacks and kind.acts])
def test_together_as_alone_while_watched(name, owned):
    compare({"name": name}, owned, SCHEDULES, watch=True)


@pytest.mark.parametrize("params", [*({"name": n} for n in OBJECTIVES), {"name": "boosting", "growth": "client"}])
def test_who_trains_one_by_one_says_why(params):
    objective = build_objective(Plugin(**params))
    assert objective.stackable() or objective.alone


def compare(params, owned, schedules, dtype=torch.float64, tolerance=1e-12, watch=False, whole=False):
    objective = build_objective(Plugin(**params))
    objective = watched(objective) if watch else objective
    model, samples = network(objective).to(dtype), pool(OWNED[owned], whole).to(torch.device("cpu"), dtype)
    received = {n: t.clone() for n, t in model.state_dict().items()}
    sent = {n: t.to(dtype) if t.is_floating_point() else t for n, t in knowledge(model).items()}
    if whole:
        sent |= {n: t.clamp(min=1) for n, t in sent.items() if n.startswith("prototype_count.")}
    order = [2, 0, 3, 1]
    members = [Member(k, schedules[k]) for k in order]
    # What is a client's own must reach it, whatever its place in the stack.
    rows = torch.tensor([[0.7, 0.1, 0.4, 0.2], [0.3, 0.6, 0.0, 0.9], [0.5, 0.2, 0.8, 0.1]])
    own = {f"client.recency.{m}": row for m, row in zip(MODALITIES, rows, strict=True)}
    told = sent | {n: t[order] for n, t in own.items()}
    together = train_stack(Stack(model), received, objective, samples, members, OWNED[owned], told, 3, ROUND)
    twin = Stack(model)
    for place, k in enumerate(order):
        model.load_state_dict(received)
        told = sent | {n: t[k] for n, t in own.items()}
        alone = train(model, objective, samples.client(k), OWNED[owned], told, schedules[k], 3, ROUND, k)
        optional = objective.optional_blocks(blocks_of(received), OWNED[owned])
        sends = objective.sent_blocks(optional, {n: t[place] for n, t in together.report.items()})
        assert {n for n in together.model if bool(sends.get(block_of(n), True))} == set(alone.model)
        for n, t in alone.model.items():
            assert_equal(twin.plain(n, together.model[n])[place], t, f"{n} of client {k}", tolerance)
        assert set(together.report) == set(alone.report)
        for n, t in alone.report.items():
            assert_equal(together.report[n][place], t, f"the report's {n} of client {k}", tolerance)
        assert int(together.steps[place]) == alone.steps
        assert float(together.loss[place]) == pytest.approx(alone.loss, rel=tolerance)


BY_PLACE = ("moon", "arm")
"""PyTorch rounds softplus, and products of very small matrices, by their place among the clients' numbers."""


@pytest.mark.kernels
@pytest.mark.parametrize(
    "params", [p for p in CASES if p["name"] not in BY_PLACE], ids=lambda p: "-".join(str(v) for v in p.values())
)
def test_alone_with_the_shape_of_the_stack_every_bit_is_the_same(params):
    """A client that is asked again by itself, because a worker died, must not change the result."""
    objective = build_objective(Plugin(**params))
    model, samples = network(objective).float(), pool(OWNED["all"]).to(torch.device("cpu"), torch.float32)
    received = {n: t.clone() for n, t in model.state_dict().items()}
    told = {n: t.float() if t.is_floating_point() else t for n, t in knowledge(model).items()}
    members = [Member(k, SCHEDULES[k]) for k in (2, 0, 3, 1)]
    rows = {f"client.recency.{m}": torch.full((len(members),), 0.5) for m in MODALITIES}
    twin = Stack(model)
    common = twin, received, objective, samples
    together = train_stack(*common, members, OWNED["all"], told | rows, 3, ROUND)
    for place, member in enumerate(members):
        own = told | {n: t[:1] for n, t in rows.items()}
        alone = train_stack(*common, [member], OWNED["all"], own, 3, ROUND, company=members)
        for n, t in alone.model.items():
            assert torch.equal(t[0], together.model[n][place]), n
