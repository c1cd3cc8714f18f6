"""What clients measure: sums that merge into the pooled figure exactly."""

import math

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_f1_score

from fedmm.metrics import local
from fedmm.metrics.classification import accuracy, macro_f1
from fedmm.models.stacked import Stack
from fedmm.types import ClientData
from server.aggregation import merge_reports
from server.measure import figures, fit_probes

MODALITIES = tiny.names(2)


def pooled(clients):
    return ClientData(
        {m: torch.cat([c.x[m] for c in clients]) for m in MODALITIES},
        {m: torch.cat([c.present[m] for c in clients]) for m in MODALITIES},
        torch.cat([c.y for c in clients]),
        tiny.CLASSES,
    )


@pytest.mark.parametrize("depth", [None, 2])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.4]))
def test_merged_figures_are_those_of_the_pooled_data(depth, seed, missing):
    model = tiny.model(MODALITIES, seed, depth)
    clients = [tiny.data(MODALITIES, n, seed + n, missing) for n in (4, 9, 1)]
    whole = pooled(clients)
    probes = fit_probes(merge_reports([local.moments(model, c) for c in clients]), MODALITIES)
    same = fit_probes(local.moments(model, whole), MODALITIES)
    for name, w in probes.items():
        assert torch.allclose(w, same[name], atol=1e-6)
    merged = merge_reports([local.evaluate(model, c, probes) for c in clients])
    together = local.evaluate(model, whole, probes)
    for name, tensor in merged.items():
        assert torch.allclose(tensor, together[name], atol=1e-9), name
    found = figures(merged, MODALITIES)
    logits = model(whole.x, whole.present).logits
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == whole.y).double().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, whole.y)))
    for m in MODALITIES:
        here = whole.present[m]
        alone = model({m: whole.x[m]}, {m: here}).logits.argmax(1)
        assert found["per_modality"][m]["masked"] == pytest.approx(float((alone == whole.y)[here].double().mean()))
        spread = model.encode(whole.x, whole.present)[m][here].std(0, correction=0).mean()
        assert found["per_modality"][m]["feature_std"] == pytest.approx(float(spread), abs=1e-6)
    gap = [e["masked"] for e in found["per_modality"].values()]
    assert found["modality_gap"] == pytest.approx(max(gap) - min(gap))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_macro_f1_agrees_with_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    y, guess = (torch.randint(0, 4, (30,), generator=generator) for _ in range(2))
    scores = torch.nn.functional.one_hot(guess, 4).double()
    table = local.confusion(scores, y, 4)
    assert table.sum() == 30
    assert macro_f1(table) == pytest.approx(float(multiclass_f1_score(guess, y, 4, average="macro")), abs=1e-6)
    assert accuracy(table) == pytest.approx(float((guess == y).double().mean()))


def test_figures_of_nothing_are_nan():
    assert math.isnan(accuracy(torch.zeros(3, 3)))
    assert math.isnan(macro_f1(torch.zeros(3, 3)))


def test_collapsed_features_show():
    model = tiny.model(MODALITIES, 0, None)
    with torch.no_grad():
        for p in model.encoder["m2"].parameters():
            p.zero_()
    found = figures(local.evaluate(model, tiny.data(MODALITIES, 20), {}), MODALITIES)
    assert found["per_modality"]["m2"]["feature_std"] == 0.0
    assert found["per_modality"]["m1"]["feature_std"] > 0.1


def test_a_probe_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    h = torch.nn.functional.one_hot(y, 3).double() + 0.05 * torch.randn(60, 3, generator=generator).double()
    design = torch.cat([h, torch.ones(60, 1)], 1)
    target = torch.nn.functional.one_hot(y, 3).double()
    w = local.solve_probe(design.T @ design, design.T @ target)
    assert bool(((h @ w[:-1] + w[-1]).argmax(1) == y).all())
    constant = torch.ones(60, 4).double()  # collapsed features must not break the solver
    assert bool(torch.isfinite(local.solve_probe(constant.T @ constant, constant.T @ target)).all())


def test_confidence_is_summed_over_complete_samples():
    model, data = tiny.model(MODALITIES), tiny.data(MODALITIES, 12, 3, 0.4)
    report = local.confidence(model, data)
    complete = data.present["m1"] & data.present["m2"]
    logits = model(data.x, data.present).modality_logits
    for m in MODALITIES:
        truth = torch.softmax(logits[m], 1)[torch.arange(12), data.y]
        assert float(report[f"confidence.{m}"]) == pytest.approx(float(truth[complete].sum().detach()))
        assert float(report[f"confidence_count.{m}"]) == int(complete.sum())
    assert local.confidence(model, data.only(["m1"])) == {}


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training):
    model, data = tiny.model(MODALITIES).train(training), tiny.data(MODALITIES, 6)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for statistic in local.STATISTICS.values():
        assert all(not t.requires_grad for t in statistic(model, data).values())
    local.evaluate(model, data, {})
    assert model.training == training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("chunk", [4, 256])
def test_rows_that_only_fill_up_a_stack_change_no_prototype(monkeypatch, chunk):
    """Not even whole chunks of them, as a client has that was split off a stack of longer ones."""
    monkeypatch.setattr(local, "_STACKED_CHUNK", chunk)
    model, sizes, rows = tiny.model(MODALITIES), (7, 3), 16
    clients = [tiny.data(MODALITIES, n, seed, 0.3) for seed, n in enumerate(sizes)]

    def filled(tensors):
        return torch.stack([torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])]) for t in tensors])

    stacked = ClientData(
        {m: filled([c.x[m] for c in clients]) for m in MODALITIES},
        {m: filled([c.present[m] for c in clients]) for m in MODALITIES},
        filled([c.y for c in clients]),
        clients[0].classes,
        torch.arange(rows) < torch.tensor(sizes).unsqueeze(1),
    )
    twin = Stack(model)
    twin.bind(twin.expand_all(dict(model.state_dict()), len(sizes)))
    found = local.prototypes(twin.model, stacked)
    for k, client in enumerate(clients):
        for name, value in local.prototypes(model, client).items():
            assert torch.allclose(found[name][k], value, rtol=1e-6, atol=1e-7)
