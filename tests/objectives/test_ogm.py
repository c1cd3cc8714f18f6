"""OGM-GE on data whose first modality is easy: its encoder is slowed, the other one learns as before."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from clients.trainer import LocalSchedule, train
from fedmm import seeding
from fedmm.data import build_federation, load_dataset
from fedmm.models import build_model
from fedmm.objectives.joint import Joint
from fedmm.objectives.ogm import GradientModulation
from fedmm.testing.objective import check_objective

EASY_FIRST = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__spread": [0.05, 0.49],
    "data__params__dims": [8, 30],
    "scenario__clients": 1,
    "train__clients_per_round": 1,
}
SCHEDULE = LocalSchedule(3, 16, 0.05, 0.0, 0.0)


def start(config):
    dataset = load_dataset(config.data)
    data = build_federation(dataset, config.scenario, config.seed).client(0, "train")
    return build_model(dataset.specs, len(dataset.classes), config.model, config.seed), data


def path_length(objective):
    """How far each encoder moves from where it began."""
    model, data = start(tiny.config("ogm-ge", **EASY_FIRST))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, objective, data, data.modalities, {"round": torch.tensor(0)}, SCHEDULE, 0, 1, 0)
    moved = {n: float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()}
    return {m: sum(v for n, v in moved.items() if n.startswith(f"encoder.{m}.")) ** 0.5 for m in data.modalities}


def test_the_leading_encoder_is_slowed_and_the_other_is_not():
    joint = path_length(Joint())
    slowed = path_length(GradientModulation(alpha=1.0, enhance=False))
    assert slowed["m1"] < 0.7 * joint["m1"]
    assert slowed["m2"] > 0.95 * joint["m2"]
    assert path_length(GradientModulation(alpha=0.0, enhance=False)) == joint


def test_noise_moves_both_encoders_and_comes_from_the_seed_tree():
    quiet, loud, again = (path_length(GradientModulation(enhance=e)) for e in (False, True, True))
    assert all(loud[m] > quiet[m] for m in quiet)
    assert loud == again


@pytest.mark.parametrize("switches", [{"enhance": False, "reference": "others"}, {"stop_round": 5}], ids=str)
def test_variants_keep_the_contract(switches):
    check_objective(GradientModulation(**switches))


def test_one_client_is_a_plain_training_loop(tmp_path):
    """The loop of the paper with `torch.optim.SGD`, on the same rows and the same noise."""
    config = tiny.config(
        "ogm-ge", scenario__clients=1, train__clients_per_round=1, train__rounds=2, train__momentum=0.0
    )
    server = tiny.server(tmp_path, config)
    server.run()
    model, data = start(config)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=config.train.weight_decay)
    head = model.head["joint"]
    for round in (1, 2):
        order = torch.randperm(len(data), generator=seeding.torch_rng(config.seed, "batches", round, 0))
        dice = seeding.torch_rng(config.seed, "noise", round, 0)
        for rows in order.split(16):
            h = [model.encoder[m](data.x[m][rows]) for m in ("m1", "m2")]
            optimiser.zero_grad()
            F.cross_entropy(head(torch.cat(h, 1)), data.y[rows]).backward()
            halves = head.weight.detach().split(8, 1)
            z = [h_m.detach() @ w.T + head.bias.detach() / 2 for h_m, w in zip(h, halves, strict=True)]
            s = [z_m.softmax(1)[torch.arange(len(rows)), data.y[rows]].sum() for z_m in z]
            for i, m in enumerate(("m1", "m2")):
                rho = s[i] / s[1 - i]
                k = 1 - torch.tanh(0.3 * rho) if rho > 1 else 1.0
                for p in model.encoder[m].parameters():
                    p.grad = k * p.grad + p.grad.std() * torch.randn(p.shape, generator=dice)
            optimiser.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, server.model[name], atol=1e-5), name


def test_the_real_loop(tmp_path):
    hashes = []
    for enhance in (True, True, False):
        config = tiny.config(
            "ogm-ge",
            objective__enhance=enhance,
            data__params__modalities=3,
            scenario__modalities__multimodal=0.7,
            scenario__modalities__missing=0.1,
        )
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
