"""MLA's objective against its equations: weights after several batches of alternating steps, to 1e-6."""

import mla
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.trainer import LocalSchedule, train
from fedmm.objectives.mla import Alternating, advance
from fedmm.seeding import torch_rng

SIZE, LR = 4, 0.1


def compare(modalities, data, seed=0, epochs=2, **switches):
    model = tiny.model(modalities, seed, None, heads=False, fusion="sum")
    p = {n: t.clone() for n, t in model.state_dict().items()}
    schedule = LocalSchedule(epochs, SIZE, LR, 0.0, 0.0)
    objective = Alternating(**switches)
    result = train(model, objective, data, data.modalities, {"round": torch.tensor(0)}, schedule, seed, 0, 0)
    stream = torch_rng(seed, "batches", 0, 0)
    batches = [rows.tolist() for _ in range(epochs) for rows in torch.randperm(len(data), generator=stream).split(SIZE)]
    outer = objective.division == "outer"
    theirs = mla.train(p, data, batches, LR, len(data), objective.project, outer)
    tiny.assert_close(result.model, {n: theirs[n] for n in result.model})
    assert result.steps == len(batches) * len(data.modalities)


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    project=st.booleans(),
)
def test_weights_after_two_epochs(count, seed, missing, project):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, project=project)


@pytest.mark.parametrize("outer", [False, True])
def test_the_projection_entry_by_entry(outer):
    generator = torch_rng(0, "features")
    P, ours = torch.eye(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    for a in (0.1, 0.05, 0.02):
        r = torch.randn(5, generator=generator, dtype=torch.float64).abs()
        P, ours = mla.advance(P, r, a, outer), advance(ours, r, torch.tensor(a), outer=outer)
        assert torch.allclose(ours, P, atol=1e-6)
    compare(tiny.names(2), tiny.data(tiny.names(2), SIZE), epochs=1, division="outer")


def test_uni_modal_clients_two_of_three_and_a_turn_without_samples():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 9)
    compare(modalities, data.only(["m2"]))
    compare(modalities, data.only(["m1", "m3"]))
    data.present["m2"][:] = torch.arange(9) < 2
    data.x["m2"][2:] = float("nan")
    compare(modalities, data)


def test_the_projection_forgets_a_direction_and_spares_what_is_orthogonal():
    one, two = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, -3.0])
    projection = advance(torch.eye(3), one, torch.tensor(0.01))
    assert float((projection @ one).norm()) < 1e-3 * float((projection @ two).norm())
    assert torch.allclose(projection @ two, two / 2**0.5, atol=1e-3)
