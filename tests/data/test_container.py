import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmm.data import container
from fedmm.errors import DataError

arrays = hnp.arrays(
    dtype=st.sampled_from([np.dtype(np.uint8), np.dtype("<i4"), np.dtype("<f4")]),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=arrays, second=arrays)
def test_what_is_written_is_read(tmp_path, first, second):
    digest = container.write(tmp_path / "a.json", {"first": first, "second": second}, {"title": "ü", "n": 3})
    got, meta = container.read(tmp_path / "a.json")
    assert meta == {"title": "ü", "n": 3}
    assert digest == container.content_hash(got, meta)
    for name, array in (("first", first), ("second", second)):
        assert got[name].dtype == array.dtype
        assert got[name].tobytes() == array.tobytes()
        assert got[name].shape == array.shape


def test_text_survives():
    lines = ["label\ttag|tag", "", "日本語\t"]
    assert container.array_text(container.text_array(lines)) == lines


def _written(tmp_path):
    path = tmp_path / "a.json"
    container.write(path, {"x": np.arange(20, dtype=np.int32)}, {"seed": 1})
    return path


def _swap_meta(body):
    body["meta"]["seed"] = 2


def _swap_values(body):
    body["arrays"]["x"]["data"] = container._encode(np.arange(1, 21, dtype=np.int32))["data"]


def _cut_values(body):
    body["arrays"]["x"]["data"] = body["arrays"]["x"]["data"][:8]


def _no_hash(body):
    del body["sha256"]


def _no_codec(body):
    body["arrays"]["x"]["codec"] = "pickle"


@pytest.mark.parametrize("damage", [_swap_meta, _swap_values, _cut_values, _no_hash, _no_codec])
def test_damage_is_found(tmp_path, damage):
    path = _written(tmp_path)
    body = json.loads(path.read_text())
    damage(body)
    path.write_text(json.dumps(body))
    with pytest.raises(DataError) as caught:
        container.read(path)
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert "rebuild" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"arrays": 3}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match="damaged"):
        container.read(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        container.read(tmp_path / "none.json")
