"""Conformance battery for a data set of your own: `check_dataset(load_dataset(cfg))` in a test."""

from __future__ import annotations

import numpy as np

from fedmm.config.schema import ModalityConfig, PartitionConfig, ScenarioConfig
from fedmm.data.federation import build_federation
from fedmm.data.validate import problems
from fedmm.types import SPLITS, Dataset


def check_dataset(dataset: Dataset) -> None:
    """Check shapes, types, finite values, labels, slots, splits by unit, and that clients can be built from it.

    Raises:
        AssertionError: Names everything that is wrong.
    """
    found = problems(dataset)
    assert not found, f"{dataset.name}: " + "; ".join(found)
    for name, code in SPLITS.items():
        if name == "train":
            missing = sorted(set(range(len(dataset.classes))) - set(dataset.y[dataset.split == code].tolist()))
            assert not missing, f"{dataset.name}: no training sample of the classes {missing}"
    _check_clients(dataset)


def _check_clients(dataset: Dataset) -> None:
    clients = min(2, int(np.sum(dataset.split == 0)))
    scenario = ScenarioConfig(
        clients=clients, partition=PartitionConfig(name="iid", min_samples=1), modalities=ModalityConfig()
    )
    federation = build_federation(dataset, scenario, seed=0)
    for name, code in SPLITS.items():
        rows = np.sort(np.concatenate(federation.indices[name]))
        assert np.array_equal(rows, np.flatnonzero(dataset.split == code)), f"{dataset.name}: {name} is not spread once"
        data = federation.client(0, name)
        assert data.modalities == dataset.modalities, f"{dataset.name}: slots are not in the order of specs"
