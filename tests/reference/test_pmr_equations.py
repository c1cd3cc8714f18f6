"""PMR's objective against its equations, in value and gradient, to 1e-6."""

import pmr
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.pmr import PrototypicalRebalance
from fedmm.seeding import torch_rng


def drift(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch_rng(seed, "drift"), dtype=torch.float64)


def compare(modalities, data, seed=0, round=0, epochs=1, **switches):
    model = tiny.model(modalities, seed, None, heads=False)
    objective = PrototypicalRebalance(**switches)
    state = objective.begin(model, data, {"round": torch.tensor(round)})
    C = pmr.centres(model.state_dict(), data)
    for epoch in range(epochs):
        drift(model, seed + epoch)
        if epoch:
            state |= objective.renew(model, data, state)
            C = pmr.renewed(C, model.state_dict(), data, objective.memory)
    rows = torch.randperm(len(data), generator=torch_rng(seed, "rows"))[: max(2, len(data) * 2 // 3)]
    (loss,) = objective.losses(model, data.batch(rows), state)
    p = tiny.leaves(model.state_dict())
    entropy = objective.entropy if round < objective.entropy_rounds else 0.0
    expected = pmr.L(p, data, rows.tolist(), modalities, C, objective.alpha, entropy)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))
    return float(loss.detach())


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    entropy=st.sampled_from([0.0, 0.3]),
    epochs=st.sampled_from([1, 2, 3]),
)
def test_loss_and_gradient(count, seed, missing, entropy, epochs):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, entropy=entropy, epochs=epochs)


def test_uni_modal_clients_and_the_end_of_the_entropy():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))
    early, late, off = (compare(modalities, data, round=r, entropy=e) for r, e in ((4, 0.5), (5, 0.5), (5, 0.0)))
    assert early < late == off
