"""AGM's objective against its equations, in value and edited gradient over several steps, to 1e-6."""

import agm
import ogm
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.agm import AdaptiveModulation, contributions, factors
from fedmm.seeding import torch_rng


def compare(modalities, data, seed=0, steps=3, alpha=0.7, cap=10.0):
    """Several steps whose weights drift in between; returns the factors of the last one."""
    model = tiny.model(modalities, seed, None, heads=False)
    objective = AdaptiveModulation(alpha=alpha, cap=cap)
    state = objective.begin(model, data, {"round": torch.tensor(0)})
    parameters = {n: p for n, p in model.named_parameters() if n.split(".")[1] in ("joint", *data.modalities)}
    history, expected = [], {}
    for step in range(steps):
        rows = torch.randperm(len(data), generator=torch_rng(seed, "rows", step))[:5]
        seen = dict(state)
        (loss,) = objective.losses(model, data.batch(rows), seen)
        ours = objective.edit_gradients(tiny.gradients(loss, parameters), parameters, seen)
        state = {n: seen[n] for n in state}

        p = tiny.leaves(model.state_dict())
        value = ogm.L(p, data, rows.tolist(), modalities)
        theirs = tiny.gradients(value, p)
        assert float(loss.detach()) == pytest.approx(float(value.detach()), abs=1e-6)
        scores = agm.s(p, data, rows.tolist(), modalities) if len(data.modalities) > 1 else None
        expected = {}
        if scores is not None:
            history.append(scores)
            expected = agm.factors(history, alpha, cap)
        for n in parameters:
            theirs[n] = theirs[n] * expected.get(n.split(".")[1], 1.0)
        tiny.assert_close(ours, {n: theirs[n] for n in parameters})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch_rng(seed, "drift", step))
    return expected


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.4]), cap=st.sampled_from([10.0, 0.1]))
def test_loss_and_edited_gradient_of_several_steps(count, seed, missing, cap):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, cap=cap)


def test_a_uni_modal_client_two_of_three_and_the_first_step():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    assert len(set(compare(modalities, data.only(["m1", "m3"])).values())) == 2
    assert set(compare(modalities, data, steps=1).values()) == {1.0}


def test_two_modalities_have_the_papers_contribution():
    modalities = tiny.names(2)
    data = tiny.data(modalities, 4)
    model = tiny.model(modalities, 0, None, heads=False)
    found = contributions(model, model.encode(data.x, data.present), data.present)
    for i in range(4):
        expected = agm.two(model.state_dict(), data, i, "m1", "m2", modalities)
        assert torch.allclose(found["m1"][i], expected, atol=1e-9)


@pytest.mark.parametrize("fusion", ["concat", "sum", "gated", "film", "late"])
def test_contributions_add_up_to_the_fused_logits(fusion):
    modalities = tiny.names(3)
    data = tiny.data(modalities, 6)
    model = tiny.model(modalities, 0, None, fusion=fusion)
    features = model.encode(data.x, data.present)
    phi = contributions(model, features, data.present)
    assert torch.allclose(sum(phi.values()), model.decide(features, data.present).logits)


def test_who_is_better_than_before_is_slowed_and_the_other_sped_up():
    found = factors(torch.tensor([0.5, 1.5]), torch.tensor([1.0, 1.0]), 1.0, 10.0).tolist()
    assert found[0] == pytest.approx(torch.tensor(1 - 2.718281828).exp().item())
    assert found[1] == pytest.approx(torch.tensor(1 - 0.367879441).exp().item())
    wild = factors(torch.tensor([0.0, 1e6]), torch.tensor([1e6, 0.0]), 1.0, 10.0)
    assert bool(torch.isfinite(wild).all())
