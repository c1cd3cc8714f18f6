"""`fedmm card`: every method's card can be read where it is used."""

import io
import os
import pty
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from rich.markdown import Markdown
from typer.testing import CliRunner

from experiments import cards
from experiments.cli import app
from fedmm.config.presets import PRESETS
from fedmm.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path.read_text() for path in (ROOT / "experiments" / "cards").glob("*.md")}


def invoke(*arguments):
    return CliRunner().invoke(app, ["card", *arguments])


def test_every_preset_has_a_card_or_is_a_plain_baseline():
    for preset in PRESETS:
        has_card = cards.SHARED.get(preset, preset) in FILES
        assert has_card != (preset in cards.PLAIN), f"{preset} needs a card, or a place in PLAIN"


def test_the_tables_name_what_is_there():
    assert set(cards.SHARED.values()) <= set(FILES)
    assert set(cards.PLAIN) <= set(PRESETS)
    assert all((ROOT / place).is_file() for place in cards.PLAIN.values())


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(cards.PLAIN)))
def test_a_presets_card_speaks_of_it(preset):
    assert f"`{preset}`" in cards.card(preset)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("fedcmi", "fedcmi"), ("cmsfed", "cmsfed"), ("aug", "boosting"), ("mnl", "negative"), ("boosting", "boosting")],
)
def test_a_pipe_gets_the_text_itself(name, stem):
    result = invoke(name)
    assert (result.exit_code, result.output) == (0, FILES[stem])


def test_a_plain_baseline_says_where_it_is():
    result = invoke("fedavg")
    assert result.exit_code == 0
    assert PRESETS["fedavg"].description in result.output
    assert cards.PLAIN["fedavg"] in result.output


def test_a_terminal_gets_a_laid_out_page():
    first, second = pty.openpty()
    command = [sys.executable, "-m", "experiments.cli", "card", "mnl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    done = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=second, stderr=subprocess.PIPE)
    os.close(second)
    shown = b""
    while True:
        try:
            part = os.read(first, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(first)
    _, error = done.communicate(timeout=60)
    assert done.returncode == 0, error
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert "Multimodal Negative Learning" in text
    assert "|---|" not in text
    assert "**Claim.**" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("stem", sorted(FILES))
def test_every_card_can_be_laid_out(stem):
    out = io.StringIO()
    Console(file=out, width=100).print(Markdown(FILES[stem]))
    assert "|---|" not in out.getvalue()  # its tables are tables


def test_an_unknown_name_brings_the_nearest():
    result = invoke("fedcmj")
    assert "Traceback" not in result.output
    assert result.exit_code == 2
    assert 'did you mean "fedcmi"?' in result.stderr
    with pytest.raises(ConfigError, match="no card"):
        cards.card("../README")


def test_without_a_name_all_are_listed_with_a_line_each():
    result = invoke()
    assert result.exit_code == 0
    lines = {text.split()[0]: text for text in result.output.splitlines() if text.strip()}
    assert set(PRESETS) | set(FILES) <= set(lines)
    assert all(PRESETS[name].description in lines[name] for name in PRESETS)
    assert "AUG" in lines["boosting"]


def test_the_cards_are_installed_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "cards/*.md" in data["experiments"] or "*.md" in data.get("experiments.cards", [])
