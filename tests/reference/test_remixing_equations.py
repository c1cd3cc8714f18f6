"""Data Remixing against its equations, in value and gradient, to 1e-6, and the properties of the method."""

import pytest
import remixing
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.objectives.remixing import Remixing, assign, divergence_from_uniform
from fedmm.seeding import torch_rng

MASKS = ["skip", "feature", "input"]


def batches(objective, data, state, size=4, seed=0):
    return list(objective.batches(data, state, size, torch_rng(seed, "batches")))


def start(modalities, data, seed=0, round=9, **switches):
    model = tiny.model(modalities, seed, None)
    objective = Remixing(**switches)
    return model, objective, objective.begin(model, data, {"round": torch.tensor(round)})


def kept_of(model, data):
    p = {n: t.detach() for n, t in model.state_dict().items()}
    return [remixing.keep(p, data, i) for i in range(len(data))]


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4]),
    mask=st.sampled_from(MASKS),
    reassemble=st.booleans(),
)
def test_loss_and_gradient_of_every_batch(count, seed, missing, mask, reassemble):
    modalities = tiny.names(count)
    data = tiny.data(modalities, 9, seed, missing)
    model, objective, state = start(modalities, data, seed, mask=mask, reassemble=reassemble)
    kept = kept_of(model, data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch_rng(seed, "drift"), dtype=torch.float64)
    for batch in batches(objective, data, state):
        rows = batch.index.tolist()
        assert not reassemble or len({kept[i] for i in rows}) == 1  # Eq. 9
        (loss,) = objective.losses(model, batch, state)
        p = tiny.leaves(model.state_dict())
        shown = data.only(tuple(batch.x))
        expected = remixing.L(p, shown, rows, modalities, kept, mask=mask)
        assert float(loss) == pytest.approx(float(expected), abs=1e-6)
        tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_warm_up_is_the_joint_loss_and_half_the_unimodal_ones(mask, count, missing):
    modalities = tiny.names(count)
    data = tiny.data(modalities, 8, 1, missing)
    model, objective, state = start(modalities, data, round=4, mask=mask)
    assert [set(b.x) for b in batches(objective, data, state)] == [set(modalities)] * 2
    (loss,) = objective.losses(model, data.batch(), state)
    p = tiny.leaves(model.state_dict())
    expected = remixing.L(p, data, range(8), modalities, weight=0.5)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, dict(model.named_parameters())), tiny.gradients(expected, p))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 3), missing=st.sampled_from([0.0, 0.5]))
def test_assignment_is_a_partition_by_the_largest_entropy(seed, count, missing):
    data = tiny.data(tiny.names(count), 12, seed, missing)
    generator = torch_rng(seed, "logits")
    logits = {m: 3 * torch.randn(12, tiny.CLASSES, generator=generator) for m in data.modalities}
    kept = assign(logits, data.present)
    assert torch.equal(torch.stack(list(kept.values())).sum(0), torch.ones(12, dtype=torch.int64))
    entropy = {m: torch.distributions.Categorical(logits=o).entropy() for m, o in logits.items()}
    for m, o in logits.items():
        log_classes = torch.tensor(float(tiny.CLASSES)).log()
        assert torch.allclose(divergence_from_uniform(o), log_classes - entropy[m], atol=1e-6)
        for i in kept[m].nonzero().flatten().tolist():
            assert data.present[m][i]
            assert all(entropy[m][i] >= entropy[n][i] - 1e-6 for n in logits if data.present[n][i])


@pytest.mark.parametrize("order", ["interleave", "blocked"])
@pytest.mark.parametrize("mask", MASKS)
def test_an_epoch_shows_every_sample_once_in_batches_of_one_subset(mask, order):
    modalities = tiny.names(3)
    data = tiny.data(modalities, 40, 2, 0.2)
    model, objective, state = start(modalities, data, 2, mask=mask, order=order)
    kept = kept_of(model, data)
    found = batches(objective, data, state)
    assert torch.equal(torch.cat([b.index for b in found]).sort().values, torch.arange(40))
    runs = [kept[int(b.index[0])] for b in found]
    assert all(kept[i] == m for m, b in zip(runs, found, strict=True) for i in b.index.tolist())
    assert (runs == sorted(runs)) == (order == "blocked")
    assert [b.index.tolist() for b in batches(objective, data, state)] == [b.index.tolist() for b in found]
    assert [b.index.tolist() for b in batches(objective, data, state, seed=1)] != [b.index.tolist() for b in found]


def test_the_model_in_training_assigns_before_further_epochs():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 20, 2, 0.2)
    model, objective, state = start(modalities, data, 2, reassign="epoch")
    first = kept_of(model, data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch_rng(2, "drift"), dtype=torch.float64)
    state |= objective.renew(model, data, state)
    second = kept_of(model, data)
    assert first != second
    for m in modalities:
        assert state[f"sample.kept.{m}"].tolist() == [kept == m for kept in second]


def test_skipped_encoders_get_no_gradient_at_all():
    modalities = tiny.names(3)
    data = tiny.data(modalities, 20)
    model, objective, state = start(modalities, data)
    for batch in batches(objective, data, state):
        (m,) = batch.x
        model.zero_grad(set_to_none=True)
        objective.losses(model, batch, state)[0].backward()
        trained = {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
        assert trained == {m, "joint"}
        joint = model.head["joint"].weight.grad.reshape(tiny.CLASSES, 3, tiny.FEATURES)
        assert [bool(joint[:, slot].any()) for slot in range(3)] == [n == m for n in modalities]
