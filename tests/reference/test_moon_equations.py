"""MOON's objective against its equations, in value and gradient, to 1e-6."""

import moon
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.moon import ModelContrast
from fedmm.seeding import torch_rng


def compare(modalities, data, seed=0, older=True, **switches):
    model = tiny.model(modalities, seed, None, heads=False)
    previous = tiny.model(modalities, seed + 7, None, heads=False).state_dict()
    objective = ModelContrast(mu=0.7, tau=0.4, **switches)
    sent = {f"model.{n}": t for n, t in previous.items() if n.startswith("encoder.")} if older else {}
    state = objective.begin(model, data, {"round": torch.tensor(3)} | sent)
    received = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch_rng(seed, "drift"), dtype=torch.float64)
    rows = torch.randperm(len(data), generator=torch_rng(seed, "rows"))[: max(2, len(data) * 2 // 3)]
    (loss,) = objective.losses(model, data.batch(rows), state)
    p = tiny.leaves(model.state_dict())
    expected = moon.L(p, received, previous if older else None, data, rows.tolist(), modalities, 0.7, 0.4, **switches)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    level=st.sampled_from(["joint", "modality"]),
)
def test_loss_and_gradient(count, seed, missing, level):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, level=level)


def test_uni_modal_clients_two_of_three_and_no_older_model():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 8)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]), level="modality")
    compare(modalities, data, older=False)
