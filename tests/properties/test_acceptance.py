"""The acceptance checks of an implementation of FedCMI and CMSFed, numbered; runs go through the real round loop."""

from dataclasses import replace

import boosting
import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from fedmm.data.audio import log_spectrogram
from fedmm.data.partition import dirichlet
from fedmm.metrics.local import STATISTICS, evaluate
from fedmm.models.blocks import block_of
from fedmm.objectives import OBJECTIVES
from fedmm.objectives.infiltration import Infiltration, pairwise_temperature
from server.aggregation import Update, blockwise_mean
from server.knowledge import distances
from server.selection.submodular import Cover

NO_LOSS = {"objective__alpha": 0.0}


# 1 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multimodal", [1.0, 0.5])
def test_1_cmsfed_without_threshold_and_prototype_loss_is_divfl(tmp_path, multimodal):
    scenario = {"scenario__modalities__multimodal": multimodal, "train__rounds": 3}
    ours = tiny.run(tmp_path / "a", tiny.config("cmsfed", selection__theta=float("inf"), **NO_LOSS, **scenario))
    divfl = tiny.run(tmp_path / "b", tiny.config("divfl", selection__vectors="encoders", **scenario))
    assert ours["weights_sha256"] == divfl["weights_sha256"]
    assert tiny.selected(tmp_path / "a") == tiny.selected(tmp_path / "b")


@pytest.mark.parametrize("multimodal", [1.0, 0.5])
def test_1_one_random_candidate_is_fedavg(tmp_path, multimodal):
    scenario = {"scenario__modalities__multimodal": multimodal, "train__rounds": 3}
    settings = tiny.config("cmsfed", selection__theta=float("inf"), selection__candidates=1, **NO_LOSS, **scenario)
    ours = tiny.run(tmp_path / "a", settings)
    fedavg = tiny.run(tmp_path / "b", tiny.config("fedavg", **scenario))
    assert ours["weights_sha256"] == fedavg["weights_sha256"]
    assert tiny.selected(tmp_path / "a") == tiny.selected(tmp_path / "b")
    assert ours["test"] == fedavg["test"]


def test_1_the_full_method_is_not_divfl(tmp_path):
    ours = tiny.run(tmp_path / "a", tiny.config("cmsfed"))
    divfl = tiny.run(tmp_path / "b", tiny.config("divfl", selection__vectors="encoders"))
    assert ours["weights_sha256"] != divfl["weights_sha256"]


# 2 -------------------------------------------------------------------------------------------------------------


def test_2_greedy_cover_picks_one_client_of_each_cluster_and_leaves_d_alone():
    rng = np.random.default_rng(0)
    for trial in range(20):
        centres = np.where(np.arange(8) % 2, 5.0, -5.0)
        D = distances(torch.tensor(centres[:, None] + 0.01 * rng.normal(size=(8, 3))))
        before, cover, picked, sums = D.copy(), Cover(D), [], []
        for _ in range(2):
            picked.append(cover.best([k for k in range(8) if k not in picked]))
            cover.add(picked[-1])
            sums.append(cover.nearest.sum())
        assert {k % 2 for k in picked} == {0, 1}, trial
        assert sums[1] <= sums[0]
        assert np.array_equal(D, before)


# 3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "weak"), [([0.0, 1.0], "m2"), ([1.0, 0.0], "m1")])
def test_3_a_noise_modality_is_picked_alone_and_slots_mirror(tmp_path, noise, weak):
    settings = tiny.config(
        "cmsfed",
        data__params__noise=noise,
        data__params__unique=0.0,
        data__params__redundant=1.0,
        data__params__synergy=0.0,
        data__params__spread=0.2,
        data__params__samples=420,
        train__rounds=5,
        train__local_epochs=3,
        train__lr=0.1,
    )
    tiny.run(tmp_path, settings)
    ratios = [r["value"] for r in tiny.rows(tmp_path) if r["metric"] == "imbalance_ratio"]
    assert all(r > 1.2 for r in ratios) if weak == "m2" else all(r < 1 / 1.2 for r in ratios)
    picks = [tuple(names) for of in tiny.selected(tmp_path).values() for names in of.values()]
    assert picks.count((weak,)) >= 3
    assert set(picks) <= {(weak,), ("m1", "m2")}


# 4 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.5])
def test_4_no_class_lags_more_than_average_means_tau_one(ratio):
    classes = 5
    y = torch.tensor([0, 1, 2, 3, 3, 0])  # nobody has class 4
    first = torch.full((6, classes), 0.2)
    present = {m: torch.ones(6, dtype=torch.bool) for m in "ab"}
    tau = pairwise_temperature({"a": first * ratio, "b": first}, present, y, classes, 2.0, torch.tensor(-1))
    assert torch.equal(tau, torch.ones(2, 2, classes))


def test_4_without_its_losses_fedcmi_is_fedavg(tmp_path):
    off = {"objective__lambda_self": 0.0, "objective__lambda_cmi": 0.0, "objective__prox_mu": 0.0}
    ours = tiny.server(tmp_path / "a", tiny.config("fedcmi", model__projector__depth=0, **off))
    fedavg = tiny.server(tmp_path / "b", tiny.config("fedavg"))
    ours.run(), fedavg.run()
    shared = set(ours.model) & set(fedavg.model)
    assert (
        {block_of(n) for n in shared}
        == {"encoder.m1", "encoder.m2", "head.joint"}
        == {block_of(n) for n in fedavg.model}
    )
    assert all(torch.equal(ours.model[n], fedavg.model[n]) for n in shared)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_4_infiltration_reaches_the_weak_branch_only(missing):
    modalities = tiny.names(2)
    for seed in range(4):
        data, model = tiny.data(modalities, 12, seed, missing), tiny.model(modalities, seed)
        objective = Infiltration(lambda_self=0.0)

        def without_fusion(x, present, model=model):
            out = model(x, present)
            return replace(out, logits=out.logits.detach())

        for slot, dominant in enumerate(modalities):
            weak = modalities[1 - slot]
            state = objective.begin(model, data, {"round": torch.tensor(1)})
            state["dominant"] = torch.tensor(slot)
            (loss,) = objective.losses(without_fusion, data.batch(), state)
            for name, gradient in tiny.gradients(loss, dict(model.named_parameters())).items():
                reached = block_of(name) in {f"encoder.{weak}", f"projector.{weak}.infiltration", f"head.{weak}"}
                assert bool(gradient.any()) == reached, (dominant, name)


# 5 -------------------------------------------------------------------------------------------------------------


def test_5_no_owner_leaves_a_block_alone_and_weights_sum_to_one(tmp_path):
    # All-ones updates come out as ones only if the weights of each block sum to 1.
    model = {"encoder.a.w": torch.zeros(3), "encoder.b.w": torch.rand(3), "head.joint.w": torch.zeros(2)}
    one = {n: torch.ones_like(t) for n, t in model.items() if not n.startswith("encoder.b")}
    updates = [Update(k, n, ("a",), one, {}, 0.0, True) for k, n in enumerate((3, 7, 11))]
    updates.append(Update(3, 5, ("b",), {"head.joint.w": torch.ones(2)}, {}, 0.0, True))
    new = blockwise_mean(model, updates)
    assert torch.equal(new["encoder.a.w"], torch.ones(3))
    assert torch.equal(new["head.joint.w"], torch.ones(2))
    assert torch.equal(new["encoder.b.w"], model["encoder.b.w"])


@pytest.mark.parametrize("method", ["fedavg", "fedcmi", "cmsfed"])
def test_5_a_round_without_owners_in_the_real_loop(tmp_path, method):
    settings = tiny.config(
        method, scenario__modalities__multimodal=0.0, train__clients_per_round=1, train__rounds=1, seed=3
    )
    server = tiny.server(tmp_path, settings)
    before = {n: t.clone() for n, t in server.model.items()}
    server.run()
    ((names,),) = [list(of.values()) for of in tiny.selected(tmp_path).values()]
    (owned,) = names
    for name, tensor in server.model.items():
        modality = block_of(name).split(".")[1] if not name.startswith("head.joint") else owned
        if modality != owned or block_of(name) == f"head.{owned}":
            assert torch.equal(tensor, before[name])
        else:
            assert not torch.equal(tensor, before[name]), name


# 6 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "fedavg-aux", "fedprox", "fedcmi", "cmsfed", "cmsfed-v1"])
def test_6_absent_modalities_are_never_read(tmp_path, method):
    def summary(fill):
        settings = tiny.config(
            method,
            data__name="holed:load",
            data__params__fill=fill,
            evaluate__probe=True,
            scenario__modalities__heldout="owned",
            scenario__modalities__multimodal=0.7,
            scenario__modalities__missing=0.2,
        )
        return tiny.run(tmp_path / fill, settings)

    nan, zero, huge = summary("nan"), summary("zero"), summary("huge")
    assert nan["weights_sha256"] == zero["weights_sha256"] == huge["weights_sha256"]
    assert nan["val"] == zero["val"] == huge["val"]
    assert nan["test"] == zero["test"]
    assert np.isfinite(nan["test"]["loss"])


@pytest.mark.parametrize("fusion", ["concat", "sum", "gated", "film"])
def test_6_statistics_and_evaluation_of_nan_holes(fusion):
    modalities = tiny.names(2)
    model = tiny.model(modalities, fusion=fusion)
    nan, zero = (tiny.data(modalities, 20, 1, 0.5, fill=fill) for fill in (float("nan"), 0.0))
    reports = [
        {n: t for name in STATISTICS for n, t in STATISTICS[name](model, d).items()} | evaluate(model, d, {})
        for d in (nan, zero)
    ]
    assert reports[0].keys() == reports[1].keys()
    for name, tensor in reports[0].items():
        assert bool(torch.isfinite(tensor).all()), name
        assert torch.equal(tensor, reports[1][name]), name


@pytest.mark.parametrize("fusion", ["concat", "sum", "gated", "film"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_6_gradients_of_nan_holes(name, fusion):
    modalities = tiny.names(2)
    objective = OBJECTIVES[name]()
    depth = 2 if "projector" in objective.requires else None
    # Boosted heads come with a fusion of their own.
    boosted = "boosting" in objective.requires
    model = boosting.network(modalities) if boosted else tiny.model(modalities, depth=depth, fusion=fusion)
    found = []
    for fill in (float("nan"), 0.0):
        data = tiny.data(modalities, 20, 1, 0.5, fill=fill)
        state = objective.begin(model, data, {"round": torch.tensor(1)})
        loss = sum(objective.losses(model, data.batch(), state))
        found.append(tiny.gradients(loss, dict(model.named_parameters())))
    assert all(bool(torch.isfinite(g).all()) for g in found[0].values())
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items())


# 7 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multimodal", [1.0, 0.5])
def test_7_bootstrap_directions_are_not_zero(tmp_path, multimodal):
    server = tiny.server(tmp_path, tiny.config("cmsfed", scenario__modalities__multimodal=multimodal))
    before = {n: t.clone() for n, t in server.model.items()}
    server._connect()
    server._bootstrap()
    directions = server.knowledge["directions"]
    for k, owned in enumerate(server.federates.owned):
        assert float(directions.vectors("joint")[k].norm()) > 0
        for m in server.federates.modalities:
            assert (float(directions.vectors(f"encoder.{m}")[k].norm()) > 0) == (m in owned)
    assert all(torch.equal(t, before[n]) for n, t in server.model.items())
    assert server.round == 0


# 8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 3.0, 1e8])
def test_8_dirichlet_respects_the_cap_and_places_every_sample_once(alpha):
    rng = np.random.default_rng(1)
    y, clients = rng.integers(0, 6, 1200), 10
    placed = dirichlet(y, clients, np.random.default_rng(2), alpha, cap=1.1, min_samples=0)
    assert np.array_equal(np.sort(np.concatenate(placed)), np.arange(1200))
    limit, holds = 1.1 * 1200 / clients, np.zeros(clients)
    for label in range(6):
        gains = np.array([(y[rows] == label).sum() for rows in placed])
        assert not gains[holds > limit].any()
        holds += gains
    if alpha > 1e6:
        counts = np.array([np.bincount(y[rows], minlength=6) for rows in placed])
        assert np.abs(counts - F.one_hot(torch.tensor(y), 6).sum(0).numpy() / clients).max() <= 1


@pytest.mark.parametrize(("seconds", "frames"), [(3, 299), (10, 1004)])
@pytest.mark.parametrize("length", [7_000, 200_000])
def test_8_spectrograms_have_the_papers_shapes(seconds, frames, length):
    signal = np.random.default_rng(0).normal(size=length)
    image = log_spectrogram(signal, seconds)
    assert image.shape == (257, frames)
    assert abs(image.mean()) < 1e-4
    assert abs(image.std() - 1) < 1e-3
