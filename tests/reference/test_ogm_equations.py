"""OGM-GE's objective against its equations, in value and edited gradient, to 1e-6."""

import ogm
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.ogm import GradientModulation, coefficients, contributions
from fedmm.seeding import torch_rng


def compare(modalities, data, seed=0, round=0, **switches):
    model = tiny.model(modalities, seed, None, heads=False)
    objective = GradientModulation(alpha=0.4, **switches)
    state = objective.begin(model, data, {"round": torch.tensor(round)})
    parameters = {n: p for n, p in model.named_parameters() if n.split(".")[1] in ("joint", *data.modalities)}
    rows = torch.randperm(len(data), generator=torch_rng(seed, "rows"))[: max(2, len(data) * 2 // 3)]
    (loss,) = objective.losses(model, data.batch(rows), state)
    raw = tiny.gradients(loss, parameters)
    noise = objective.noise(parameters, torch_rng(seed, "noise"))
    ours = objective.edit_gradients(raw, parameters, state | noise)

    p = tiny.leaves(model.state_dict())
    expected = ogm.L(p, data, rows.tolist(), modalities)
    theirs = tiny.gradients(expected, p)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    on = len(data.modalities) > 1 and (objective.stop_round is None or round < objective.stop_round)
    k = ogm.k(p, data, rows.tolist(), modalities, 0.4, objective.reference) if on else {}
    for n in parameters:
        m = n.split(".")[1]
        if on and n.startswith("encoder."):
            theirs[n] = ogm.edit(theirs[n], k[m], noise.get(f"noise.{n}"))
    tiny.assert_close(ours, {n: theirs[n] for n in parameters})
    return k, raw, ours


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    enhance=st.booleans(),
    reference=st.sampled_from(["smallest", "others"]),
)
def test_loss_and_edited_gradient(count, seed, missing, enhance, reference):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, enhance=enhance, reference=reference)


def test_only_the_leading_encoder_is_slowed():
    k, raw, ours = compare(tiny.names(2), tiny.data(tiny.names(2), 9, 3), 3, enhance=False)
    leader, other = sorted(k, key=k.get)
    assert k[leader] < 0.7
    assert k[other] == 1
    for n, g in raw.items():
        assert torch.allclose(ours[n], g * (k[leader] if n.startswith(f"encoder.{leader}") else 1))


def test_uni_modal_clients_two_of_three_and_after_the_end():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))
    compare(modalities, data, round=4, stop_round=5)
    _, raw, ours = compare(modalities, data, round=5, stop_round=5)
    assert all(torch.equal(ours[n], raw[n]) for n in raw)


def test_the_released_restriction_leaves_matrices_alone():
    objective = GradientModulation(tensors="convolution")
    g = {"encoder.a.c.weight": torch.randn(2, 3, 3, 3), "encoder.a.l.weight": torch.randn(3, 4)}
    state = {"coefficient.a": torch.tensor(0.5), "modulation": torch.tensor(1.0)}
    noise = objective.noise(g, torch_rng(0, "noise"))
    assert set(noise) == {"noise.encoder.a.c.weight"}
    edited = objective.edit_gradients(g, g, state | noise)
    assert torch.equal(edited["encoder.a.l.weight"], g["encoder.a.l.weight"])
    assert not torch.allclose(edited["encoder.a.c.weight"], 0.5 * g["encoder.a.c.weight"])


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_contributions_of_complete_samples_add_up_to_the_fused_logits(fusion):
    modalities = tiny.names(3)
    data = tiny.data(modalities, 6)
    model = tiny.model(modalities, 0, None, fusion=fusion)
    features = model.encode(data.x, data.present)
    parts = contributions(model, features, data.present)
    assert torch.allclose(sum(parts.values()), model.decide(features, data.present).logits)


def test_coefficients_of_a_tie_of_a_leader_and_of_nothing():
    assert coefficients(torch.tensor([2.0, 2.0]), 0.5, "smallest").tolist() == [1, 1]
    assert coefficients(torch.tensor([4.0, 2.0]), 0.5, "smallest").tolist() == pytest.approx([1 - 0.761594, 1])
    assert coefficients(torch.zeros(2), 0.5, "others").tolist() == [1, 1]
