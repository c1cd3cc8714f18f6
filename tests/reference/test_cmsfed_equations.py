"""CMSFed's local objective, prototypes and ratios against section 4.3 and 4.4, in value and gradient, to 1e-6."""

import cmsfed
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.metrics import local
from fedmm.models.blocks import block_of, blocks_of
from fedmm.objectives.joint import Auxiliary, Joint, Prox
from fedmm.objectives.prototypes import Prototypes
from fedmm.seeding import torch_rng
from server.aggregation import Update
from server.knowledge import Federates, Imbalance
from server.knowledge import Prototypes as PrototypeKnowledge


def given_prototypes(modalities, seed, known=1.0):
    """Global prototypes as broadcast (float32), and the same as {m: {c: vector}}."""
    generator = torch_rng(seed, "prototypes")
    broadcast, C = {}, {}
    for m in modalities:
        values = torch.randn(tiny.CLASSES, tiny.FEATURES, generator=generator)
        there = torch.rand(tiny.CLASSES, generator=generator) < known
        broadcast[f"prototype.{m}"] = values
        broadcast[f"prototype_count.{m}"] = there.float()
        C[m] = {c: values[c].double() for c in range(tiny.CLASSES) if there[c]}
    return broadcast, C


def compare(modalities, data, seed=0, known=1.0, bootstrap=False, **settings):
    model = tiny.model(modalities, seed, None, heads=False)
    broadcast, C = given_prototypes(modalities, seed, known)
    objective = Prototypes(**settings)
    received = {n: t.detach().clone() for n, t in model.state_dict().items()}
    state = objective.begin(model, data, {"round": torch.tensor(0)} | ({} if bootstrap else broadcast))
    own = {
        m: {c: v.float().double() for c, (v, _) in of.items()}
        for m, of in cmsfed.local_prototypes(received, data).items()
    }
    generator = torch_rng(seed, "drift")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    rows = torch.randperm(len(data), generator=generator)[: max(2, len(data) * 2 // 3)]

    (loss,) = objective.losses(model, data.batch(rows), state)
    trained = set(objective.trained_blocks(blocks_of(model.state_dict()), data.modalities))
    parameters = {n: p for n, p in model.named_parameters() if block_of(n) in trained}
    ours = tiny.gradients(loss, parameters)

    p = tiny.leaves(model.state_dict())
    options = {"every": settings.get("weak") == "all", "C_local": own}
    options |= {k: settings[k] for k in ("alpha", "beta", "variant") if k in settings}
    expected = cmsfed.L(p, data, rows.tolist(), modalities, own if bootstrap else C, **options)
    theirs = tiny.gradients(expected, p)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    tiny.assert_close(ours, {n: theirs[n] for n in parameters})
    assert all(not g.any() for n, g in theirs.items() if n not in parameters)


@pytest.mark.parametrize("variant", ["v2", "v1"])
@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.3, 0.6]), known=st.sampled_from([1.0, 0.6]))
def test_loss_and_gradient(count, variant, seed, missing, known):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, seed, missing), seed, known, variant=variant)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.0}, {"alpha": 0.5}, {"weak": "all"}, {"weak": "all", "variant": "v1"}, {"variant": "v1", "beta": 3.0}],
    ids=str,
)
def test_every_switch(count, options):
    modalities = tiny.names(count)
    compare(modalities, tiny.data(modalities, 9, 4, 0.2), 4, **options)


@pytest.mark.parametrize("variant", ["v2", "v1"])
def test_training_one_modality_always_enhances_it(variant):
    modalities = tiny.names(2)
    for m in modalities:
        compare(modalities, tiny.data(modalities, 9, 2).only([m]), 2, variant=variant)


@pytest.mark.parametrize("variant", ["v2", "v1"])
def test_bootstrap_uses_the_clients_own_prototypes(variant):
    compare(tiny.names(2), tiny.data(tiny.names(2), 9, 5), 5, bootstrap=True, variant=variant)


def test_prototypes_of_one_modality_only_do_not_break_a_client_that_owns_both():
    modalities = tiny.names(2)
    data, model = tiny.data(modalities, 9), tiny.model(modalities, 0, None, heads=False)
    broadcast, _ = given_prototypes(modalities, 0)
    half = {n: t for n, t in broadcast.items() if n.endswith("m1")} | {"round": torch.tensor(1)}
    state = Prototypes().begin(model, data, half)
    assert torch.equal(state["global"][0], broadcast["prototype.m1"])
    assert state["global_known"][1].sum() == len(set(data.y.tolist()))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), missing=st.sampled_from([0.0, 0.4]))
def test_prototype_report_and_nearest_prototype_accuracy(seed, missing):
    modalities = tiny.names(2)
    data, model = tiny.data(modalities, 10, seed, missing), tiny.model(modalities, seed, None, heads=False)
    report = local.prototypes(model, data)
    p = model.state_dict()
    for m, of in cmsfed.local_prototypes(p, data).items():
        count = report[f"prototype_count.{m}"]
        for c in range(tiny.CLASSES):
            assert int(count[c]) == (of[c][1] if c in of else 0)
            if c in of:
                assert torch.allclose(report[f"prototype_sum.{m}"][c] / count[c], of[c][0], atol=1e-9)
        if float(report[f"shown.{m}"]):
            found = float(report[f"hits.{m}"] / report[f"shown.{m}"])
            assert found == pytest.approx(cmsfed.accuracy(p, data, m), abs=1e-9)


def replies(modalities, datas, models, weak_only=()):
    return [
        Update(k, len(d), tuple(d.modalities), {}, local.prototypes(model, d), 0.0, k not in weak_only)
        for k, (d, model) in enumerate(zip(datas, models, strict=True))
    ]


def test_global_prototypes_are_class_count_weighted_and_keep_what_nobody_saw():
    modalities = tiny.names(2)
    datas = [tiny.data(modalities, 9, s, 0.2, classes=3) for s in range(4)]
    datas[1], datas[2] = datas[1].only(["m1"]), datas[2].only(["m2"])
    models = [tiny.model(modalities, s, None, heads=False) for s in range(4)]
    knowledge = PrototypeKnowledge(Federates(modalities, tuple(d.modalities for d in datas), (9,) * 4))
    before, C = given_prototypes(modalities, 1)
    knowledge.tensors = {n: t.double() for n, t in before.items()}
    knowledge.learn({}, replies(modalities, datas, models))
    clients = [cmsfed.local_prototypes(m.state_dict(), d) for m, d in zip(models, datas, strict=True)]
    expected = cmsfed.global_prototypes(clients, C)
    sent = knowledge.broadcast()
    for m in modalities:
        for c, vector in expected[m].items():
            assert torch.allclose(sent[f"prototype.{m}"][c].double(), vector, atol=1e-6)
        assert torch.equal(sent[f"prototype.{m}"][3], before[f"prototype.{m}"][3])  # class 3: nobody has it


def test_imbalance_ratios_skip_uni_modal_clients_and_keep_the_last_known():
    modalities = tiny.names(2)
    sizes = (9, 14, 7, 11)
    datas = [tiny.data(modalities, n, s) for s, n in enumerate(sizes)]
    datas[3] = datas[3].only(["m2"])
    models = [tiny.model(modalities, s, None, heads=False) for s in range(4)]
    knowledge = Imbalance(Federates(modalities, tuple(d.modalities for d in datas), sizes))
    knowledge.learn({}, replies(modalities, datas, models))
    newer = tiny.model(modalities, 50, None, heads=False)
    knowledge.learn({}, replies(modalities, datas[:1], [newer]))
    models[0] = newer
    b = {}
    for k, (d, model) in enumerate(zip(datas, models, strict=True)):
        acc = {m: max(cmsfed.accuracy(model.state_dict(), d, m), 1e-3) for m in d.modalities}
        b[k] = acc["m1"] / acc["m2"] if len(acc) == 2 else None
        assert knowledge.local_ratios(0, 1)[k] == pytest.approx(1.0 if b[k] is None else b[k])
        assert knowledge.local_ratios(1, 0)[k] == pytest.approx(1.0 if b[k] is None else 1 / b[k])
    ratio = cmsfed.global_ratio(b, dict(enumerate(sizes)))
    assert knowledge.ratio(0, 1) == pytest.approx(ratio)
    assert knowledge.order() == ((0, 1) if ratio > 1 else (1, 0))


@pytest.mark.parametrize("accuracies", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_an_accuracy_of_zero_is_clamped(accuracies):
    knowledge = Imbalance(Federates(("a", "b"), (("a", "b"),), (10,)))
    report = {}
    for m, value in zip("ab", accuracies, strict=True):
        report |= {f"hits.{m}": torch.tensor(10 * value).double(), f"shown.{m}": torch.tensor(10.0).double()}
    knowledge.learn({}, [Update(0, 10, ("a", "b"), {}, report, 0.0, True)])
    assert 1e-4 < knowledge.ratio(0, 1) < 1e4
    assert 1e-4 < knowledge.local_ratios(0, 1)[0] < 1e4


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_joint_prox_and_auxiliary(count, missing):
    modalities = tiny.names(count)
    data = tiny.data(modalities, 9, 3, missing)
    model = tiny.model(modalities, 3, None, heads=True)
    p = tiny.leaves(model.state_dict())
    fused = sum(cmsfed.CE(cmsfed.out(p, data, i, modalities), int(data.y[i])) for i in range(9)) / 9
    parameters = dict(model.named_parameters())

    (loss,) = Joint().losses(model, data.batch(), {})
    assert float(loss) == pytest.approx(float(fused), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, parameters), tiny.gradients(fused, p))

    p = tiny.leaves(model.state_dict())
    total = sum(cmsfed.CE(cmsfed.out(p, data, i, modalities), int(data.y[i])) for i in range(9)) / 9
    for m in modalities:
        own = [
            cmsfed.CE(cmsfed.linear(p, f"head.{m}", cmsfed.phi(p, m, data.x[m][i])), int(data.y[i]))
            for i in range(9)
            if data.present[m][i]
        ]
        total = total + 0.7 * sum(own) / len(own)
    (loss,) = Auxiliary(weight=0.7).losses(model, data.batch(), {})
    assert float(loss) == pytest.approx(float(total), abs=1e-6)
    tiny.assert_close(tiny.gradients(loss, parameters), tiny.gradients(total, p))

    prox = Prox(mu=0.4)
    state = prox.begin(model, data, {})
    w_hat = {n: t.detach().clone() for n, t in model.named_parameters()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter *= 1.1
    (loss,) = prox.losses(model, data.batch(), state)
    ours = prox.edit_gradients(tiny.gradients(loss, parameters), parameters, state)
    p = tiny.leaves(model.state_dict())
    total = sum(cmsfed.CE(cmsfed.out(p, data, i, modalities), int(data.y[i])) for i in range(9)) / 9
    total = total + 0.4 / 2 * sum(((p[n] - w_hat[n]) ** 2).sum() for n in p)
    tiny.assert_close(ours, tiny.gradients(total, p))
