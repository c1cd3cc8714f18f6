"""What the methods are for, on data whose weak modality is learnable but hard: these fail if the idea is removed."""

import pytest
import tiny
import torch

from fedmm.config.presets import PRESETS
from fedmm.data import build_federation, load_dataset
from fedmm.metrics.local import predict
from fedmm.models import build_model

# Both modalities tell the whole truth, m1 plainly and m2 under noise: m1 is learnt first and inhibits m2.
INHIBITED = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__samples": 560,
}
HARD_SECOND = {"data__params__spread": [0.05, 0.49], "data__params__dims": [8, 30]}
HARD_FIRST = {"data__params__spread": [0.49, 0.05], "data__params__dims": [30, 8]}
SCHEDULE = {"train__local_epochs": 2, "evaluate__every": 8, "evaluate__probe": True, "train__rounds": 8}
FEDCMI = {"train__lr": 0.03, "model__features": 16}
CMSFED = {"train__lr": 0.1, "train__rounds": 6}


def accuracies(path, method, kind, weak="m2", seeds=(0, 1), **settings):
    """Mean test accuracy of the weak modality over seeds, and the fused one."""
    alone, fused = [], []
    for seed in seeds:
        config = tiny.config(method, seed=seed, **(INHIBITED | SCHEDULE | settings))
        summary = tiny.run(path / f"{method}-{seed}-{len(list(path.iterdir()))}", config)
        alone.append(summary["test"]["per_modality"][weak][kind])
        fused.append(summary["test"]["accuracy"])
    return sum(alone) / len(alone), sum(fused) / len(fused)


@pytest.mark.parametrize(("data", "weak"), [(HARD_SECOND, "m2"), (HARD_FIRST, "m1")])
def test_fedcmi_lifts_the_weak_modality(tmp_path, data, weak):
    fedavg, _ = accuracies(tmp_path, "fedavg", "probe", weak, **data, **FEDCMI)
    fedcmi, fused = accuracies(tmp_path, "fedcmi", "probe", weak, **data, **FEDCMI)
    assert fedcmi > fedavg + 0.08
    assert fused > 0.95


@pytest.mark.parametrize(("data", "weak"), [(HARD_SECOND, "m2"), (HARD_FIRST, "m1")])
def test_cmsfed_lifts_the_weak_modality(tmp_path, data, weak):
    fedavg, _ = accuracies(tmp_path, "fedavg", "masked", weak, **data, **CMSFED)
    cmsfed, fused = accuracies(tmp_path, "cmsfed", "masked", weak, **data, **CMSFED)
    assert cmsfed > fedavg + 0.1
    assert fused > 0.95


def test_cmsfeds_gain_is_more_than_its_selection(tmp_path):
    without, _ = accuracies(tmp_path, "cmsfed", "masked", objective__alpha=0.0, **HARD_SECOND, **CMSFED)
    whole, _ = accuracies(tmp_path, "cmsfed", "masked", **HARD_SECOND, **CMSFED)
    assert whole > without + 0.04


def infiltrated(path, weight):
    """Accuracy of the weak modality's infiltration branch on the test samples."""
    config = tiny.config("fedcmi", objective__lambda_cmi=weight, **(INHIBITED | SCHEDULE | HARD_SECOND | FEDCMI))
    server = tiny.server(path / str(weight), config)
    server.run()
    dataset = load_dataset(config.data)
    model = build_model(dataset.specs, len(dataset.classes), config.model, 0)
    model.load_state_dict(server.model)
    federation = build_federation(dataset, config.scenario, config.seed)
    hits = total = 0
    for k in range(len(federation)):
        data = federation.client(k, "test")
        if len(data):
            hits += int((predict(model, data).infiltration_logits["m2"].argmax(1) == data.y).sum())
            total += len(data)
    return hits / total


def test_the_infiltration_loss_teaches_the_infiltration_branch(tmp_path):
    assert infiltrated(tmp_path, 1.0) > infiltrated(tmp_path, 0.0) + 0.2


def test_missing_clients_learn_from_the_stand_in(tmp_path):
    """With uni-modal clients about, the infiltration feature in the hole is not what zeros are."""
    hashes = set()
    for fill in ("infiltration", "zero"):
        config = tiny.config("fedcmi", model__projector__fill=fill, scenario__modalities__multimodal=0.5)
        hashes.add(tiny.run(tmp_path / fill, config)["weights_sha256"])
    assert len(hashes) == 2


@pytest.mark.parametrize("multimodal", [1.0, 0.4])
@pytest.mark.parametrize("method", PRESETS)
def test_every_method_runs_with_three_modalities(tmp_path, method, multimodal):
    config = tiny.config(
        method,
        data__params__modalities=3,
        scenario__modalities__multimodal=multimodal,
        scenario__modalities__missing=0.1,
        evaluate__probe=True,
    )
    summary = tiny.run(tmp_path, config)
    assert summary["status"] == "completed"
    assert set(summary["test"]["per_modality"]) == {"m1", "m2", "m3"}
    assert all(torch.isfinite(torch.tensor(e["probe"])) for e in summary["test"]["per_modality"].values())
    assert summary["test"]["loss"] < 20


@pytest.mark.parametrize("method", ["fedavg", "fedavg-aux", "fedprox", "divfl", "power-of-choice"])
def test_methods_without_imbalance_run_with_one_modality(tmp_path, method):
    summary = tiny.run(tmp_path, tiny.config(method, data__modalities=["m1"]))
    assert set(summary["test"]["per_modality"]) == {"m1"}
