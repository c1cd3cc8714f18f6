"""One client, full participation: the federation is plain local training, bit for bit."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from fedmm import seeding
from fedmm.data import build_federation, load_dataset
from fedmm.models import build_model


@pytest.mark.parametrize("epochs", [1, 3])
def test_one_client_is_a_plain_training_loop(tmp_path, epochs):
    config = tiny.config(
        "fedavg",
        scenario__clients=1,
        train__clients_per_round=1,
        train__rounds=1,
        train__local_epochs=epochs,
        train__momentum=0.9,
    )
    server = tiny.server(tmp_path, config)
    server.run()

    dataset = load_dataset(config.data)
    model = build_model(dataset.specs, len(dataset.classes), config.model, config.seed)
    rows = build_federation(dataset, config.scenario, config.seed).indices["train"][0]
    x = {m: torch.from_numpy(dataset.x[m][rows]) for m in dataset.modalities}
    y = torch.from_numpy(dataset.y[rows])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    stream = seeding.torch_rng(config.seed, "batches", 1, 0)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=stream)
        for start in range(0, len(y), 16):
            batch = order[start : start + 16]
            features = [model.encoder[m](x[m][batch]) for m in dataset.modalities]
            loss = F.cross_entropy(model.head["joint"](torch.cat(features, 1)), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert set(model.state_dict()) == set(server.model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, server.model[name]), name


def test_momentum_starts_anew_each_round(tmp_path):
    """Two rounds of one epoch differ from one round of two epochs once there is momentum, and only then."""
    one = {"scenario__clients": 1, "train__clients_per_round": 1, "train__batch_size": 1000}
    models = {}
    for momentum in (0.0, 0.9):
        for rounds, epochs in ((2, 1), (1, 2)):
            config = tiny.config(
                "fedavg", train__rounds=rounds, train__local_epochs=epochs, train__momentum=momentum, **one
            )
            server = tiny.server(tmp_path / f"{momentum}-{rounds}", config)
            server.run()
            models[momentum, rounds] = server.model["head.joint.weight"]
    assert torch.allclose(models[0.0, 1], models[0.0, 2], atol=1e-6)
    assert not torch.allclose(models[0.9, 1], models[0.9, 2], atol=1e-4)
