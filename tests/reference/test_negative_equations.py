"""MNL's objective against its equations, in value and gradient, to 1e-6, and the properties of the method."""

import negative
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedmm.objectives.joint import Auxiliary
from fedmm.objectives.negative import Negative, guidance
from fedmm.seeding import torch_rng

ON = {"round": torch.tensor(20)}
SWITCHES = [
    {},
    {"competitor": "per_modality"},
    {"guide": "global"},
    {"reduction": "code", "extra": True},
    {"guide": "global", "competitor": "per_modality", "extra": True},
]


def compare(modalities, data, seed=0, broadcast=ON, lam=0.7, fusion="late", **switches):
    model = tiny.model(modalities, seed, None, fusion=fusion)
    objective = Negative(lambda_negative=lam, **switches)
    state = objective.begin(model, data, broadcast)
    p_hat = {n: t.detach().clone() for n, t in model.state_dict().items()}
    generator = torch_rng(seed, "drift")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.randperm(len(data), generator=generator)[: max(2, len(data) * 2 // 3)]
    (loss,) = objective.losses(model, data.batch(rows), state)
    p = tiny.leaves(model.state_dict())
    if broadcast["round"] < objective.warmup_rounds:
        lam = 0.0
    expected = negative.L(p, p_hat, data, rows.tolist(), modalities, lam=lam, **switches)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    switches=st.sampled_from(SWITCHES),
    fusion=st.sampled_from(["late", "concat"]),
)
def test_loss_and_gradient(count, seed, missing, switches, fusion):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, fusion=fusion, **switches)


@pytest.mark.parametrize("round", [0, 3, 4])
def test_guidance_starts_after_the_warm_up(round):
    compare(tiny.names(2), tiny.data(tiny.names(2), 8), broadcast={"round": torch.tensor(round)})


def test_uni_modal_client_and_two_of_three():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))


def logits(seed, count=2, samples=40, classes=tiny.CLASSES):
    generator = torch_rng(seed, "logits")
    o = {
        m: (2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)).requires_grad_()
        for m in tiny.names(count)
    }
    y = torch.randint(0, classes, (samples,), generator=generator)
    return o, torch.stack([t.detach() for t in o.values()]).mean(0), dict.fromkeys(o, torch.ones(samples).bool()), y


def term(objective, o, fused, present, y):
    return objective.negative_loss(o, *guidance(o, fused, present, y), y).mean()


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_released_form(seed):
    o, fused, present, y = logits(seed)
    ours = term(Negative(reduction="code", extra=True), o, fused, present, y)
    theirs = negative.released(o["m1"], o["m2"], fused, y)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)
    tiny.assert_close(tiny.gradients(ours, o), tiny.gradients(theirs, o))


def test_released_form_is_mnl_and_a_cross_entropy_over_the_classes():
    o, fused, present, y = logits(7)
    code = term(Negative(reduction="code", extra=True), o, fused, present, y)
    _, guided = guidance(o, fused, present, y)
    own = sum((guided[m] * F.cross_entropy(o[m], y, reduction="none")).mean() for m in o)
    assert float(code) == pytest.approx(float((term(Negative(), o, fused, present, y) + own) / tiny.CLASSES), abs=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_no_gradient_reaches_the_guide_and_no_loss_where_the_criteria_disagree(count):
    o, fused, present, y = logits(1, count, samples=200)
    _, guided = guidance(o, fused, present, y)
    gradients = tiny.gradients(term(Negative(), o, fused, present, y), o)
    for m in o:
        assert not gradients[m][~guided[m]].any()
        assert bool(gradients[m][guided[m]].any(1).all())
    one = guidance({m: t[:1] for m, t in _disagreeing().items()}, torch.zeros(1, 3), _here(1), torch.tensor([0]))[1]
    assert not any(bool(mask.any()) for mask in one.values())
    assert 0 < float(torch.stack(list(guided.values())).any(0).double().mean()) < 1


def _here(samples):
    return {m: torch.ones(samples).bool() for m in tiny.names(2)}


def _disagreeing():
    # m1 has the larger target probability, m2 the larger margin over the fused competitor (class 1).
    o = {"m1": torch.tensor([[2.0, 1.5, -9.0]]), "m2": torch.tensor([[2.0, 0.0, 2.0]])}
    assert o["m1"].softmax(1)[0, 0] > o["m2"].softmax(1)[0, 0]
    return o


def test_with_two_classes_the_other_class_is_all_there_is():
    o, fused, present, y = logits(3, classes=2)
    guide, guided = guidance(o, fused, present, y)
    rows = torch.arange(len(y))
    expected = sum(-(guided[m] * guide[rows, 1 - y] * o[m].log_softmax(1)[rows, 1 - y]).mean() for m in o)
    assert float(term(Negative(lambda_negative=1.0), o, fused, present, y)) == pytest.approx(float(expected), abs=1e-9)


def test_the_order_of_modalities_does_not_matter():
    o, fused, present, y = logits(4, 3)
    turned = {m: o[m] for m in reversed(o)}
    value = float(term(Negative(), o, fused, present, y))
    assert float(term(Negative(), turned, fused, present, y)) == pytest.approx(value, abs=1e-12)


def test_samples_with_one_modality_give_exactly_the_cross_entropies():
    modalities = tiny.names(2)
    data = tiny.data(modalities, 10)
    first = torch.arange(10) < 5
    single = type(data)(data.x, {"m1": first, "m2": ~first}, data.y, data.classes)
    model = tiny.model(modalities, 0, None)
    objective = Negative(warmup_rounds=0)
    (loss,) = objective.losses(model, single.batch(), objective.begin(model, single, ON))
    assert torch.equal(loss, Auxiliary().losses(model, single.batch(), {})[0])


def test_gradient_of_the_guided_logits():
    """dMNL/do_c = P_c S - [c != y] P^g_c with S the guide's mass on wrong classes."""
    o, fused, present, y = logits(5)
    guide, guided = guidance(o, fused, present, y)
    wrong = 1 - F.one_hot(y, tiny.CLASSES)
    S = (guide * wrong).sum(1, keepdim=True)
    found = tiny.gradients(term(Negative(lambda_negative=1.0), o, fused, present, y), o)
    for m in o:
        expected = guided[m].unsqueeze(1) * (o[m].softmax(1) * S - wrong * guide) / len(y)
        assert torch.allclose(found[m], expected.detach(), atol=1e-12)
