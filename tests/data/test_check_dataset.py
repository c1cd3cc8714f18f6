import dataclasses

import numpy as np
import pytest

from fedmm.config.schema import DataConfig
from fedmm.data import load_dataset
from fedmm.testing.dataset import check_dataset


@pytest.fixture(scope="module")
def sound():
    return load_dataset(DataConfig(name="synthetic", samples=400))


def with_x(data, m, x):
    return dataclasses.replace(data, x={**data.x, m: x})


def _nan(data):
    x = data.x["m1"].copy()
    x[5] = np.nan
    return with_x(data, "m1", x)


def _nothing(data):
    gone = {m: p.copy() for m, p in data.present.items()}
    for p in gone.values():
        p[3] = False
    return dataclasses.replace(data, present=gone)


def _no_class(data):
    keep = np.flatnonzero((data.split != 0) | (data.y != 2))
    from fedmm.data.common import select

    return select(data, keep)


BROKEN = {
    "float64, not float32": lambda d: with_x(d, "m1", d.x["m1"].astype(np.float64)),
    "has shape": lambda d: with_x(d, "m1", d.x["m1"][:, :-1]),
    "same modalities": lambda d: dataclasses.replace(d, present={}),
    "not finite": _nan,
    "labels must lie": lambda d: dataclasses.replace(d, y=d.y + 1),
    "y is int32": lambda d: dataclasses.replace(d, y=d.y.astype(np.int32)),
    "units are in": lambda d: dataclasses.replace(d, unit=d.unit % 50),
    "split must be one of": lambda d: dataclasses.replace(d, split=d.split + np.int8(1)),
    "the split val is empty": lambda d: dataclasses.replace(
        d, split=np.where(d.split == 1, 2, d.split).astype(np.int8)
    ),
    "natural must lie": lambda d: dataclasses.replace(d, natural=d.y, natural_names=("a",)),
    "no modality at all": _nothing,
    "classes must be": lambda d: dataclasses.replace(d, classes=("a",) * len(d.classes)),
    "no training sample of the classes": _no_class,
    "without a dot": lambda d: dataclasses.replace(
        d, **{f: {k.replace("m1", "m.1"): v for k, v in getattr(d, f).items()} for f in ("x", "specs", "present")}
    ),
}


def test_a_sound_data_set_passes(sound):
    assert check_dataset(sound) is None


def test_absent_values_may_be_anything(sound):
    x, present = sound.x["m1"].copy(), sound.present["m1"].copy()
    x[7], present[7] = np.nan, False
    holes = dataclasses.replace(with_x(sound, "m1", x), present={**sound.present, "m1": present})
    assert check_dataset(holes) is None


@pytest.mark.parametrize("words", list(BROKEN))
def test_what_is_broken_is_named(sound, words):
    with pytest.raises(AssertionError, match=words):
        check_dataset(BROKEN[words](sound))
