"""FedCMI's objective against the equations of sections 3.3 to 3.5, in value and gradient, to 1e-6."""

import fedcmi
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.models.blocks import block_of, blocks_of
from fedmm.objectives.infiltration import Infiltration, pairwise_temperature
from fedmm.seeding import torch_rng

DEPTH, KAPPA = 2, 2.0


def compare(modalities, data, *, round=3, broadcast=None, seed=0, depth=DEPTH, reference=None, **switches):
    """Value and gradient of one batch by both routes; the local model has moved away from the received one."""
    model = tiny.model(modalities, seed, depth)
    objective = Infiltration(**switches)
    state = objective.begin(model, data, {"round": torch.tensor(round)} | (broadcast or {}))
    p_hat = {n: t.detach().clone() for n, t in model.state_dict().items()}
    generator = torch_rng(seed, "drift")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.randperm(len(data), generator=generator)[: max(2, len(data) * 2 // 3)]

    (loss,) = objective.losses(model, data.batch(rows), state)
    trained = set(objective.trained_blocks(blocks_of(model.state_dict()), data.modalities))
    parameters = {n: p for n, p in model.named_parameters() if block_of(n) in trained}
    ours = objective.edit_gradients(tiny.gradients(loss, parameters), parameters, state)

    p = tiny.leaves(model.state_dict())
    mu = switches.get("prox_mu", 0.0)
    expected = fedcmi.L(
        p, p_hat, data, rows.tolist(), modalities, depth, mu=mu, trained=list(parameters), **(reference or {})
    )
    theirs = tiny.gradients(expected, p)
    proximal = mu / 2 * sum(float(((p[n] - p_hat[n]) ** 2).sum()) for n in parameters)
    assert float(loss) == pytest.approx(float(expected) - proximal, abs=1e-6)
    tiny.assert_close(ours, {n: theirs[n] for n in parameters})
    untouched = {n: g for n, g in theirs.items() if n not in parameters}
    assert all(not g.any() for g in untouched.values())
    return loss


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.3, 0.6]), classes=st.integers(1, tiny.CLASSES))
def test_loss_and_gradient(count, seed, missing, classes):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing, classes=classes), seed=seed)


SWITCHES = {
    "without self loss": ({"lambda_self": 0.0}, {"lambda_1": 0.0}),
    "earlier weights": ({"lambda_self": 1.0, "lambda_cmi": 2.0}, {"lambda_1": 1.0, "lambda_2": 2.0}),
    "without infiltration": ({"lambda_cmi": 0.0}, {"lambda_2": 0.0}),
    "tau = 1": ({"temperature": "off"}, {"tau_off": True}),
    "kappa": ({"kappa": 0.7}, {"kappa": 0.7}),
    "proximal": ({"prox_mu": 1.0}, {}),
    "local teacher": ({"teacher": "local"}, {"teacher": "local"}),
    "no warm-up": ({"warmup_rounds": 0, "prox_mu": 0.1}, {}),
}


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", SWITCHES)
def test_every_ablation_switch(name, count, missing):
    modalities = tiny.names(count)
    ours, theirs = SWITCHES[name]
    for seed in range(2):
        data = tiny.data(modalities, 8, seed, missing)
        compare(modalities, data, seed=seed, reference=theirs, **ours)


@pytest.mark.parametrize("count", [2, 3])
def test_round_global_takes_one_decision_for_direction_and_temperature(count):
    modalities = tiny.names(count)
    seen = set()
    for slot, m in enumerate(modalities):
        loss = compare(
            modalities,
            tiny.data(modalities, 8, 1),
            broadcast={"dominant": torch.tensor(slot)},
            dominance="round_global",
            reference={"dominant": m},
        )
        seen.add(round(float(loss), 9))
    assert len(seen) == count  # the decision matters


def test_round_global_before_the_first_report_is_batch_local():
    compare(
        tiny.names(2), tiny.data(tiny.names(2), 8), broadcast={"dominant": torch.tensor(-1)}, dominance="round_global"
    )


@pytest.mark.parametrize(("round", "weight"), [(0, 0.0), (1, 1.0), (2, 1.0)])
def test_infiltration_starts_after_the_warm_up(round, weight):
    compare(tiny.names(2), tiny.data(tiny.names(2), 8), round=round, reference={"lambda_2": weight})


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_projector_depth(depth):
    compare(tiny.names(2), tiny.data(tiny.names(2), 6), depth=depth)


@pytest.mark.parametrize("count", [2, 3])
def test_uni_modal_client_fills_the_hole_with_the_infiltration_feature(count):
    modalities = tiny.names(count)
    for m in modalities:
        data = tiny.data(modalities, 8).only([m])
        compare(modalities, data, prox_mu=0.3)
        blocks = blocks_of(tiny.model(modalities).state_dict())
        trained = Infiltration().trained_blocks(blocks, (m,))
        # No self loss there: its H^m has nothing to say in the mean of this block.
        assert set(trained) == {f"encoder.{m}", f"projector.{m}.self", f"projector.{m}.infiltration", "head.joint"}
        assert Infiltration().trained_blocks(blocks, modalities) == blocks


def test_client_that_owns_two_of_three_modalities():
    modalities = tiny.names(3)
    compare(modalities, tiny.data(modalities, 9, missing=0.2).only(["m1", "m3"]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), kappa=st.sampled_from([0.5, 2.0]))
def test_temperature_of_every_class(seed, kappa):
    data = tiny.data(tiny.names(2), 12, seed, 0.2)
    model = tiny.model(tiny.names(2), seed, DEPTH)
    state = Infiltration(kappa=kappa).begin(model, data, {"round": torch.tensor(1)})
    expected = fedcmi.temperatures(model.state_dict(), data, "m1", "m2", DEPTH, kappa)
    assert state["tau"][0, 1].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(state["tau"][0, 1], state["tau"][1, 0])
    assert bool(((state["tau"] > 0) & (state["tau"] <= 1)).all())


@pytest.mark.parametrize(("ratio", "tau"), [(1.1, 0.84), (1.25, 0.69), (1.5, 0.55), (2.0, 0.42), (3.0, 0.31)])
def test_temperature_table_of_the_paper(ratio, tau):
    # One class lags `ratio` times the mean over all classes, the others less than the mean; modality a dominates.
    classes = 5
    relative = [ratio] + [(classes - ratio) / (classes - 1)] * (classes - 1)
    probability = (0.3 * torch.tensor(relative)).unsqueeze(1).expand(-1, classes)
    weak = torch.full((classes, classes), 0.25)
    here = {"a": torch.ones(classes, dtype=torch.bool), "b": torch.ones(classes, dtype=torch.bool)}
    found = pairwise_temperature(
        {"a": probability, "b": weak}, here, torch.arange(classes), classes, KAPPA, torch.tensor(-1)
    )
    assert float(found[0, 1, 0]) == pytest.approx(tau, abs=0.006)
    assert found[0, 1, 1:].tolist() == [1.0] * (classes - 1)


def test_a_tie_makes_the_second_modality_dominant():
    modalities = tiny.names(2)
    data = tiny.data(modalities, 6)
    twin = type(data)(dict.fromkeys(modalities, data.x["m1"]), data.present, data.y, data.classes)
    model = tiny.model(modalities, 0, DEPTH)
    tensors = model.state_dict()
    for name in list(tensors):
        if ".m1." in name:
            tensors[name.replace(".m1.", ".m2.")].copy_(tensors[name])
    objective = Infiltration(lambda_self=0.0)
    state = objective.begin(model, twin, {"round": torch.tensor(1)})
    base = Infiltration(lambda_self=0.0, lambda_cmi=0.0).losses(model, twin.batch(), {})[0]
    loss = objective.losses(model, twin.batch(), state)[0] - base
    moved = {n for n, g in tiny.gradients(loss, dict(model.named_parameters())).items() if bool(g.abs().sum() > 1e-9)}
    assert {block_of(n) for n in moved} == {"encoder.m1", "projector.m1.infiltration", "head.m1"}
