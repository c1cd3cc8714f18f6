"""Values that must never change silently: the seed tree, starting weights, what clients are told."""

import json

import tiny
import torch

from fedmm import seeding
from fedmm.spec import client_spec
from server.plan import plan


def test_the_seed_tree():
    assert seeding.derive(0, "batches", 1, 2) == 6339310489653765308
    assert seeding.derive(0, "batches", 1, 2) != seeding.derive(0, "batches", 12)
    assert seeding.derive(1, "selection") != seeding.derive(0, "selection")
    assert seeding.numpy_rng(3, "selection", 4).integers(0, 1000, 5).tolist() == [259, 341, 180, 758, 458]
    order = torch.randperm(6, generator=seeding.torch_rng(3, "batches", 4, 5))
    assert order.tolist() == [2, 5, 0, 4, 3, 1]


def test_starting_weights():
    weights = plan(tiny.config("fedavg")).model.state_dict()["encoder.m1.1.weight"].flatten()[:4]
    assert torch.allclose(weights, torch.tensor([-0.00762, 0.04032, 0.06605, -0.06109]), atol=1e-5)


def test_clients_are_told_nothing_of_the_servers_side():
    keys = set(json.loads(client_spec(tiny.config("cmsfed"))))
    assert keys == {"data", "scenario", "model", "objective", "train", "faults", "seed"}
