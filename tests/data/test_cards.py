import pytest

from fedmm.config.schema import DataConfig
from fedmm.data import DATASETS, load_dataset
from fedmm.data.cards import describe, preview
from fedmm.errors import ConfigError


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_data_set_has_a_card(name):
    card = describe(name)
    assert card.startswith(f"# {name}")
    for part in ("## Source", "## Licence", "## Construction", "## Sizes", "## Known facts"):
        assert part in card


def test_the_avdigits_card_says_that_speech_is_synthetic():
    assert "text-to-speech" in describe("avdigits")


def test_unknown_cards_are_refused():
    with pytest.raises(ConfigError, match='did you mean "emoji9"'):
        describe("emoji")


@pytest.mark.parametrize("name", ["avdigits", "emoji9"])
def test_a_picture_is_drawn(tmp_path, name):
    path = preview(load_dataset(DataConfig(name=name)), tmp_path / "new" / "picture.png", columns=4)
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["picture.txt", "picture"])
def test_a_picture_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"choose from: \.png"):
        preview(load_dataset(DataConfig(name="synthetic")), tmp_path / name)
    assert not list(tmp_path.iterdir())
