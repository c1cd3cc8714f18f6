import sys

import numpy as np
import pytest

from fedmm.config.schema import DataConfig
from fedmm.data import load_dataset
from fedmm.errors import ConfigError, DataError

OWN = """
import numpy as np
from fedmm.types import Dataset, ModalitySpec

def load(cfg, n=90):
    y = np.arange(n) % 3
    return Dataset(
        name="mine", specs={"a": ModalitySpec("vector", (4,)), "b": ModalitySpec("vector", (2,))},
        classes=("x", "y", "z"), x={m: np.ones((n, d), dtype=np.float32) for m, d in (("a", 4), ("b", 2))}, y=y,
        split=(np.arange(n) // 30).astype(np.int8), unit=np.arange(n),
        present={m: np.ones(n, dtype=bool) for m in "ab"},
    )

def leaky(cfg):
    import dataclasses
    return dataclasses.replace(load(cfg), unit=np.arange(90) % 40)

def number(cfg):
    return 3

def lost(cfg):
    return open("/nowhere/at/all.csv")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_data_for_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_data_for_test"
    sys.modules.pop("own_data_for_test", None)


def test_a_users_function_is_loaded(own):
    data = load_dataset(DataConfig(name=f"{own}:load"))
    assert data.name == "mine"
    assert len(data.sha256) == 64


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("leaky", DataError, "units are in train and in val"),
        ("number", DataError, "returned int"),
        ("lost", DataError, "FileNotFoundError"),
        ("lod", ConfigError, "cannot import.*has no attribute"),
    ],
)
def test_a_users_mistake_is_named(own, function, error, words):
    with pytest.raises(error, match=words):
        load_dataset(DataConfig(name=f"{own}:{function}"))


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"name": "avdigit"}, 'did you mean "avdigits"'),
        ({"name": "nothing.there:load"}, "cannot import"),
        ({"name": "avdigits", "preset": "imbalance"}, 'did you mean "imbalanced"'),
        ({"name": "cgmnist", "preset": "easy"}, "shortcut"),
        ({"name": "cgmnist", "params": {"jitter": 1}}, "no parameters"),
        ({"name": "emoji9", "params": {"txt": "tags"}}, 'did you mean "text"'),
        ({"name": "emoji9", "params": {"text": "tag"}}, 'did you mean "tags"'),
        ({"name": "emoji9", "params": {"per_client": 0}}, "code points"),
        ({"name": "emoji9", "root": "/tmp"}, "reads no folder"),
        ({"name": "avdigits", "params": {"natural": "voice"}}, "speaker"),
        ({"name": "avdigits", "modalities": ["image", "sound"]}, "sound"),
        ({"name": "avdigits", "modalities": []}, "one at least"),
        ({"name": "avdigits", "modalities": ["image", "image"]}, "once"),
        ({"name": "avdigits", "samples": 20}, "at least 30"),
    ],
)
def test_bad_requests_name_place_and_remedy(cfg, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_dataset(DataConfig(**cfg))
    assert str(caught.value).startswith("data.")


def test_modalities_can_be_chosen_and_reordered():
    both = load_dataset(DataConfig(name="avdigits"))
    swapped = load_dataset(DataConfig(name="avdigits", modalities=["audio", "image"]))
    alone = load_dataset(DataConfig(name="avdigits", modalities=["audio"]))
    assert swapped.modalities == ("audio", "image")
    assert np.array_equal(alone.x["audio"], both.x["audio"])
    assert list(alone.x) == list(alone.present) == ["audio"]
    assert len({both.sha256, swapped.sha256, alone.sha256}) == 3


@pytest.mark.parametrize("samples", [60, 350, 1000])
def test_samples_are_capped_in_proportion(samples):
    data = load_dataset(DataConfig(name="avdigits", samples=samples))
    assert samples * 0.8 <= len(data.y) <= samples
    counts = np.bincount(data.split * 10 + data.y, minlength=30)
    assert counts.min() >= 1
    assert np.bincount(data.split)[0] / len(data.y) == pytest.approx(4 / 7, abs=0.1)
    assert len(data.x["image"]) == len(data.present["audio"]) == len(data.natural) == len(data.y)


def test_a_large_cap_changes_nothing():
    whole, capped = (load_dataset(DataConfig(name="cgmnist", samples=s)) for s in (None, 10**6))
    assert whole.sha256 == capped.sha256
