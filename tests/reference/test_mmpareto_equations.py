"""MMPareto's objective against its equations, in values and combined gradient, to 1e-6."""

import mmpareto
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.trainer import gradients_of
from fedmm.objectives.mmpareto import ParetoIntegration, min_norm
from fedmm.seeding import torch_rng


def compare(modalities, data, seed=0, **switches):
    model = tiny.model(modalities, seed, None)
    objective = ParetoIntegration(**switches)
    state = objective.begin(model, data, {"round": torch.tensor(0)})
    parameters = {n: p for n, p in model.named_parameters() if n.split(".")[1] in ("joint", *data.modalities)}
    rows = torch.randperm(len(data), generator=torch_rng(seed, "rows"))[: max(2, len(data) * 2 // 3)]
    losses = objective.losses(model, data.batch(rows), state)
    ours = objective.combine(gradients_of(losses, parameters), parameters, state)

    p = tiny.leaves(model.state_dict())
    joint = mmpareto.L_0(p, data, rows.tolist(), modalities)
    own = {m: mmpareto.L_m(p, data, rows.tolist(), m) for m in data.modalities}
    for loss, expected in zip(losses, [joint, *own.values()], strict=True):
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    g_0 = tiny.gradients(joint, p)
    g_m = {}
    for m, value in own.items():
        g_m[m] = tiny.gradients(value, tiny_subset(p, m))
    theirs = {n: g_0[n] + (g_m[m][n] if (m := n.split(".")[1]) in g_m and n in g_m[m] else 0) for n in parameters}
    conflicts = 0
    if len(data.modalities) > 1 and objective.integrate:
        for m in data.modalities:
            names = [n for n in parameters if n.startswith(f"encoder.{m}.")]
            pair = ({n: g_0[n] for n in names}, {n: g_m[m][n] for n in names})
            conflicts += mmpareto.dot(pair[0].values(), pair[1].values()) < 0
            theirs |= mmpareto.integrate(*pair, objective.gamma, objective.solve == "tensor")
    tiny.assert_close(ours, theirs)
    return conflicts


def tiny_subset(p, m):
    return {n: t for n, t in p.items() if n.startswith((f"encoder.{m}.", f"head.{m}."))}


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    solve=st.sampled_from(["encoder", "tensor"]),
)
def test_losses_and_combined_gradient(count, seed, missing, solve):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, solve=solve)


def test_conflicting_and_agreeing_encoders_both_occur():
    modalities = tiny.names(2)
    found = [compare(modalities, tiny.data(modalities, 6, seed), seed) for seed in range(12)]
    assert 0 < sum(found) < 2 * len(found)


def test_uni_modal_clients_two_of_three_and_the_plain_sum():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))
    compare(modalities, data, integrate=False)


def test_the_min_norm_point_of_known_pairs():
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert float(min_norm([one], [two], 0)) == pytest.approx(0.8)
    assert float(min_norm([one], [-one], 0)) == pytest.approx(0.5)
    assert float(min_norm([one], [3 * one], 0)) == 1
    assert float(min_norm([one], [one], 0)) == 0.5


def test_a_direction_of_conflict_hurts_neither_loss():
    """Common descent: a positive product with both gradients, and no shorter than their sum."""
    objective, name = ParetoIntegration(gamma=1.0), "encoder.m.w"
    g_0, g_m = torch.tensor([1.0, 0.2]), torch.tensor([-3.0, 0.4])
    (d,) = objective.combine([{name: g_0}, {name: g_m}], {}, {"gamma": torch.tensor(1.0)}).values()
    assert float(d @ g_0) > 0
    assert float(d @ g_m) > 0
    assert float((g_0 + g_m) @ g_0) < 0
    assert float(d.norm()) == pytest.approx(float((g_0 + g_m).norm()), rel=1e-6)
