"""G-Blend's objective and its server half against the equations, to 1e-6."""

import gblend
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.gblend import GradientBlending, held_out
from fedmm.seeding import torch_rng
from server.aggregation import Update
from server.blending import Blend
from server.facts import Federates

WEIGHTS = {"fused": 0.5, "m1": 0.1, "m2": 0.3, "m3": 0.1}


def compare(modalities, data, seed=0, weights=WEIGHTS, **switches):
    model = tiny.model(modalities, seed, None)
    objective = GradientBlending(held_out=0.3, split=seed, **switches)
    sent = {f"blend.{k}": torch.tensor(w, dtype=torch.float64) for k, w in weights.items()}
    state = objective.begin(model, data, {"round": torch.tensor(0)} | sent)
    held = set(state["sample.held"].nonzero().flatten().tolist())
    assert len(held) == round(0.3 * len(data))
    start = model.state_dict()
    start = {n: t.clone() for n, t in start.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch_rng(seed, "drift"), dtype=torch.float64)
    rows = torch.randperm(len(data), generator=torch_rng(seed, "rows"))[: max(2, len(data) * 2 // 3)]
    (loss,) = objective.losses(model, data.batch(rows), state)
    p = tiny.leaves(model.state_dict())
    w = weights if weights and objective.adapt else dict.fromkeys(WEIGHTS, 1.0)
    expected = gblend.L(p, data, rows.tolist(), modalities, held, w)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))

    report = objective.end(model, data, state)
    for when, q in (("before", start), ("after", model.state_dict())):
        for part, some in (("held", held), ("train", set(range(len(data))) - held)):
            for k, values in gblend.terms(q, data, sorted(some), modalities).items():
                assert float(report[f"blend.{k}.{part}.sum.{when}"]) == pytest.approx(float(sum(values)), abs=1e-6)
                assert int(report[f"blend.{k}.{part}.count"]) == len(values)


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.4]), adapt=st.booleans())
def test_loss_gradient_and_report(count, seed, missing, adapt):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, adapt=adapt)


def test_uni_modal_clients_two_of_three_and_no_weights_yet():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 9)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))
    compare(modalities, data, weights={})


def test_held_out_samples_are_the_same_in_every_round_and_another_choice_for_another_seed():
    data = tiny.data(tiny.names(2), 40)
    first, again, other = (held_out(data, 0.25, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert int(first.sum()) == int(other.sum()) == 10
    assert not torch.equal(first, other)
    assert int(held_out(tiny.data(tiny.names(2), 2), 0.1, 0).sum()) == 0


def report(**losses):
    """branch=(n, T_0, V_0, T_1, V_1)."""
    found = {}
    for k, (n, *values) in losses.items():
        pairs = [(part, when) for when in ("before", "after") for part in ("train", "held")]
        for (part, when), value in zip(pairs, values, strict=True):
            found[f"blend.{k}.{part}.sum.{when}"] = torch.tensor(value * n, dtype=torch.float64)
            found[f"blend.{k}.{part}.count"] = torch.tensor(float(n), dtype=torch.float64)
    return found


def learned(*reports):
    known = Blend(Federates(("a", "b"), (("a", "b"),) * len(reports), (10,) * len(reports)))
    known.learn({}, [Update(k, 10, ("a", "b"), {}, r, 0.0, True) for k, r in enumerate(reports)])
    return {n.removeprefix("blend."): float(w) for n, w in known.broadcast().items()}


def test_weights_are_generalisation_over_squared_overfitting_of_the_pooled_losses():
    found = learned(
        report(fused=(10, 1.0, 1.0, 0.4, 0.6), a=(10, 1.0, 1.0, 0.5, 0.7), b=(10, 1.2, 1.2, 0.2, 1.1)),
        report(fused=(30, 1.0, 1.0, 0.4, 0.6)),
    )
    raw = {
        "fused": gblend.ratio((1.0, 1.0), (0.4, 0.6)),
        "a": gblend.ratio((1.0, 1.0), (0.5, 0.7)),
        "b": gblend.ratio((1.2, 1.2), (0.2, 1.1)),
    }
    assert found == pytest.approx({k: v / sum(raw.values()) for k, v in raw.items()}, rel=1e-6)
    assert found["b"] < 0.02  # it only overfits


def test_nothing_known_one_branch_unknown_and_no_overfitting():
    assert learned() == pytest.approx({"fused": 1 / 3, "a": 1 / 3, "b": 1 / 3})
    found = learned(report(fused=(10, 1.0, 1.0, 0.4, 0.6), a=(10, 1.0, 1.0, 0.5, 0.8)))
    assert found["b"] == pytest.approx((found["fused"] + found["a"]) / 2, rel=1e-6)
    found = learned(report(fused=(10, 1.0, 1.0, 0.5, 0.5), a=(10, 1.0, 1.0, 0.5, 0.8), b=(10, 1.0, 1.0, 1.0, 1.0)))
    assert found["fused"] == pytest.approx(0.5 / 1e-4 / (0.5 / 1e-4 + 0.2 / 0.09), rel=1e-5)
