"""A client whose first modality is easy and whose second one is learnable but hard, for tests of behaviour."""

import tiny
import torch

from clients.trainer import LocalSchedule, train
from fedmm.data import build_federation, load_dataset
from fedmm.metrics.local import predict, prototypes
from fedmm.models import build_model

DATA = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__samples": 560,
    "data__params__spread": [0.05, 0.49],
    "data__params__dims": [8, 30],
    "scenario__clients": 1,
    "train__clients_per_round": 1,
}
MIXED = {
    "data__params__modalities": 3,
    "scenario__modalities__multimodal": 0.7,
    "scenario__modalities__missing": 0.1,
}


def start(seed=0, method="fedavg-aux", **settings):
    """Model, training samples and test samples."""
    config = tiny.config(method, seed=seed, **DATA, **settings)
    dataset = load_dataset(config.data)
    federation = build_federation(dataset, config.scenario, config.seed)
    model = build_model(dataset.specs, len(dataset.classes), config.model, config.seed)
    return model, federation.client(0, "train"), federation.client(0, "test")


def trained(objective, seed=0, rounds=6, epochs=2, broadcast=None, **settings):
    """Model and test samples after some rounds of local training."""
    model, data, test = start(seed, **settings)
    for round in range(rounds):
        sent = {"round": torch.tensor(round)} | (broadcast(model, round) if broadcast else {})
        train(model, objective, data, data.modalities, sent, LocalSchedule(epochs, 16, 0.05, 0.0, 0.0), 0, round, 0)
    return model, test


def weights(objective, epochs, **settings):
    """All weights after one round, flattened."""
    model, _ = trained(objective, rounds=1, epochs=epochs, **settings)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def nearest_prototype(found):
    """Test accuracy of each modality by the nearest class mean."""
    report = prototypes(*found)
    return {m: float(report[f"hits.{m}"] / report[f"shown.{m}"]) for m in found[1].modalities}


def alone(found):
    """Test accuracy of the fused head with each modality alone."""
    model, test = found
    hits = {}
    for m, h in predict(model, test).features.items():
        logits = model.decide({m: h}, {m: test.present[m]}).logits
        hits[m] = float((logits.argmax(1) == test.y).double().mean())
    return hits
