import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from fedmm.config.schema import DataConfig, ModalityConfig, PartitionConfig, ScenarioConfig
from fedmm.data import build_federation, load_dataset
from fedmm.errors import ConfigError
from fedmm.types import SPLITS


@pytest.fixture(scope="module")
def synthetic():
    return load_dataset(DataConfig(name="synthetic"))


@pytest.fixture(scope="module")
def emoji9():
    return load_dataset(DataConfig(name="emoji9", params={"per_client": 20}))


def scenario(clients=10, partition="dirichlet", **modalities):
    return ScenarioConfig(
        clients=clients, partition=PartitionConfig(name=partition), modalities=ModalityConfig(**modalities)
    )


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "quantity", "pathological"])
def test_every_sample_of_every_split_has_one_client(synthetic, partition):
    federation = build_federation(synthetic, scenario(partition=partition), seed=3)
    for name, code in SPLITS.items():
        rows = np.sort(np.concatenate(federation.indices[name]))
        assert np.array_equal(rows, np.flatnonzero(synthetic.split == code))


def test_same_seed_same_federation_other_seed_another(synthetic):
    setting = scenario(multimodal=0.5, missing=0.3)
    first, again, other = (build_federation(synthetic, setting, seed) for seed in (1, 1, 2))
    for split in SPLITS:
        for a, b in zip(first.indices[split], again.indices[split], strict=True):
            assert np.array_equal(a, b)
    assert first.owned == again.owned != other.owned
    assert all(np.array_equal(first.present[m], again.present[m]) for m in first.present)
    assert [len(r) for r in first.indices["train"]] != [len(r) for r in other.indices["train"]]


def test_more_missing_modalities_do_not_move_samples(synthetic):
    plain = build_federation(synthetic, scenario(), seed=1)
    harder = build_federation(synthetic, scenario(multimodal=0.5, missing=0.3), seed=1)
    for split in SPLITS:
        for a, b in zip(plain.indices[split], harder.indices[split], strict=True):
            assert np.array_equal(a, b)


def test_a_client_gets_tensors_of_what_it_owns(synthetic):
    federation = build_federation(synthetic, scenario(multimodal=0.5), seed=0)
    for k, owned in enumerate(federation.owned):
        train, test = federation.client(k, "train"), federation.client(k, "test")
        assert train.modalities == owned
        assert test.modalities == synthetic.modalities
        assert len(train) == len(federation.indices["train"][k]) == train.x[owned[0]].shape[0]
        assert train.x[owned[0]].dtype == torch.float32
        assert train.present[owned[0]].dtype == torch.bool
        assert train.y.dtype == torch.int64
        assert train.classes == len(synthetic.classes)


def test_heldout_owned_lacks_what_the_client_lacks(synthetic):
    federation = build_federation(synthetic, scenario(multimodal=0.5, heldout="owned"), seed=0)
    assert all(federation.client(k, "val").modalities == owned for k, owned in enumerate(federation.owned))


@pytest.mark.parametrize("heldout", ["complete", "owned"])
def test_samples_lose_modalities_but_never_all(synthetic, heldout):
    federation = build_federation(synthetic, scenario(multimodal=0.5, missing=0.4, heldout=heldout), seed=0)
    present = np.stack(list(federation.present.values()))
    assert present.any(axis=0).all()
    for split in SPLITS:
        for k, owned in enumerate(federation.owned):
            whole = present[:, federation.indices[split][k]].all()
            expected = len(owned) == 1 or (split != "train" and heldout == "complete")
            assert whole == expected


def test_values_of_absent_modalities_are_never_looked_at(synthetic):
    present = synthetic.present["m2"].copy()
    present[::3] = False
    values = synthetic.x["m2"].copy()
    values[::3] = np.nan
    holes = dataclasses.replace(
        synthetic, present={**synthetic.present, "m2": present}, x={**synthetic.x, "m2": values}
    )
    federation = build_federation(holes, scenario(multimodal=0.0), seed=0)
    for k, owned in enumerate(federation.owned):
        data = federation.client(k, "train")
        assert data.present[owned[0]].all()
        assert torch.isfinite(data.x[owned[0]]).all()
    both = build_federation(holes, scenario(), seed=0).client(0, "train")
    assert torch.equal(both.present["m2"], torch.isfinite(both.x["m2"]).all(dim=1))


def test_clients_without_a_usable_sample_are_refused(synthetic):
    nothing = dataclasses.replace(
        synthetic, present={**synthetic.present, "m2": np.zeros(len(synthetic.y), dtype=bool)}
    )
    with pytest.raises(ConfigError, match="no training samples"):
        build_federation(nothing, scenario(multimodal=0.0), seed=0)


def test_natural_heldout_samples_go_home(emoji9):
    federation = build_federation(emoji9, scenario(20, "natural"), seed=0)
    for split in SPLITS:
        for k, rows in enumerate(federation.indices[split]):
            assert set(emoji9.natural[rows].tolist()) == {k}
    merged = build_federation(emoji9, scenario(7, "natural"), seed=0)
    for split in SPLITS:
        for k, rows in enumerate(merged.indices[split]):
            assert set((emoji9.natural[rows] % 7).tolist()) == {k}
    with pytest.raises(ConfigError, match="have 20 natural clients"):
        build_federation(emoji9, scenario(21, "natural"), seed=0)


def test_natural_strangers_are_spread_over_all_clients():
    speakers = load_dataset(DataConfig(name="avdigits"))
    federation = build_federation(speakers, scenario(20, "natural"), seed=0)
    for split, code in SPLITS.items():
        rows = np.sort(np.concatenate(federation.indices[split]))
        assert np.array_equal(rows, np.flatnonzero(speakers.split == code))
    train = [set(speakers.natural[r].tolist()) for r in federation.indices["train"]]
    assert sum(map(len, train)) == len(set.union(*train)), "a speaker trains at one client only"
    assert all(len(r) for r in federation.indices["test"])


def test_summary_is_plain_and_right(synthetic):
    federation = build_federation(synthetic, scenario(multimodal=0.5), seed=0)
    summary = json.loads(json.dumps(federation.summary()))
    for split in SPLITS:
        assert np.array(summary["counts"][split]).sum(axis=1).tolist() == summary["sizes"][split]
        assert sum(summary["sizes"][split]) == (synthetic.split == SPLITS[split]).sum()
    assert summary["sha256"] == synthetic.sha256
    assert [tuple(o) for o in summary["owned"]] == list(federation.owned)


def test_a_thousand_clients_in_a_second(synthetic):
    start = time.process_time()  # others may use the machine
    federation = build_federation(synthetic, scenario(1000, multimodal=0.5, missing=0.2), seed=0)
    assert time.process_time() - start < 1
    assert len(federation) == 1000
