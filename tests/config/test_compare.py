"""Comparisons: labels, settings, seeds, and who wins over whom."""

import pytest

from experiments.tuning import trials
from fedmm.config.load import expand, load_compare
from fedmm.config.presets import PRESETS
from fedmm.errors import ConfigError

TEXT = """
data: avdigits:easy
train: {rounds: 5, lr: 1e-2}
methods:
  fedavg:
  full: fedcmi
  no-self: {method: fedcmi, objective: {lambda_self: 0}, train: {lr: 0.5}}
settings:
  all: {}
  half: {scenario.modalities: 0.5, train: {lr: 0.1, rounds: 6}}
  alpha=0.5: {scenario: {partition: {alpha: 0.5}}}
seeds: 2
baseline: full
references: [majority, local]
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def cells(*arguments):
    return {(c.setting, c.label, c.seed): c.config for c in expand(load_compare(*arguments))}


def message(*arguments):
    with pytest.raises(ConfigError) as caught:
        expand(load_compare(*arguments))
    return str(caught.value)


def test_settings_come_first_then_methods_then_seeds(path):
    expected = [
        (setting, label, seed)
        for setting in ("all", "half", "alpha=0.5")
        for label in ("fedavg", "full", "no-self")
        for seed in (0, 1)
    ]
    assert list(cells(path)) == expected


def test_base_then_setting_then_method_then_command_line(path):
    found = cells(path)
    assert found["all", "fedavg", 0].train.lr == 0.01
    assert found["half", "fedavg", 0].train.lr == 0.1
    assert found["half", "no-self", 0].train.lr == 0.5
    assert found["half", "no-self", 0].train.rounds == 6
    assert {config.train.lr for config in cells(path, ["train.lr=2"]).values()} == {2.0}


def test_each_label_has_its_preset(path):
    found = cells(path)
    assert [found["all", label, 1].method for label in ("fedavg", "full", "no-self")] == ["fedavg", "fedcmi", "fedcmi"]
    assert found["all", "no-self", 0].objective.params["lambda_self"] == 0
    assert found["all", "full", 1].seed == 1
    assert found["half", "full", 1].scenario.modalities.multimodal == 0.5


def test_baseline_and_references(path):
    compare = load_compare(path)
    assert compare.baseline == "full"
    assert compare.references == ["majority", "local"]
    assert load_compare(None, ["methods=[fedprox, fedavg]"]).baseline == "fedprox"


def test_the_command_line_picks_labels_settings_and_seeds(path):
    compare = load_compare(path, ["methods=[no-self, fedprox]", "settings=[half]", "seeds=[7]"])
    assert [(c.setting, c.label, c.seed) for c in expand(compare)] == [("half", "no-self", 7), ("half", "fedprox", 7)]
    assert compare.baseline == "no-self"


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        (["seeds=3"], [0, 1, 2]),
        (["seeds=[4, 2]"], [4, 2]),
        (["seed=9"], [9]),
        (["seed=9", "seeds=[1]"], [1]),
        ([], [0, 1]),
    ],
)
def test_seeds(path, overrides, seeds):
    assert load_compare(path, overrides).seeds == seeds


def test_tuning_goes_with_the_methods_that_are_picked(tmp_path):
    file = tmp_path / "compare.yaml"
    candidates = "{fedavg: [{train.lr: 0.1}], full: [{train.lr: 0.2}], no-self: [{train.lr: 0.3}]}"
    file.write_text(TEXT + f"tune: {{candidates: {candidates}}}", encoding="utf-8")
    picked = load_compare(file, ["methods=[full, fedavg]"])
    assert {trial.cell.label for trial in trials(picked)} == {"full", "fedavg"}
    file.write_text(TEXT + "tune: {candidates: {ful: [{train.lr: 0.1}]}}", encoding="utf-8")
    with pytest.raises(ConfigError, match='did you mean "full"'):
        trials(load_compare(file, ["methods=[full, fedavg]"]))


def test_default_seeds():
    assert load_compare(None, ["methods=[fedavg]"]).seeds == [0, 1, 2]


def test_a_method_on_the_command_line_is_for_labels_without_their_own():
    found = cells(None, ["methods={a: {}, b: {method: fedavg}}", "method=fedcmi", "seeds=1"])
    assert found["default", "a", 0].method == "fedcmi"
    assert found["default", "b", 0].method == "fedavg"


def test_all_presets_together():
    assert len(cells(None, [f"methods=[{', '.join(PRESETS)}]", "seeds=1"])) == len(PRESETS)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["methods=[fedcm]"], ["methods", '"fedcm"', 'did you mean "fedcmi"']),
        (["methods={fedcm: }"], ["methods", '"fedcm"', 'did you mean "fedcmi"']),
        (["methods=[]"], ["methods", "list or a mapping"]),
        (["methods=3"], ["methods", "3"]),
        (["methods=[[1]]"], ["methods"]),
        (["methods=[fedavg, fedavg]"], ["methods", "twice"]),
        (["methods={a: 3}"], ["methods: a", "mapping"]),
        (["methods={a/b: fedavg}"], ["a/b", "label"]),
        (["methods={a: {seed: 3}}"], ["methods: a: seed", "top"]),
        (["settings={a: {method: fedavg}}"], ["settings: a: method"]),
        (["settings=[nowhere]"], ["settings", '"nowhere"', "half"]),
        (["settings={a: {data: 3}}"], ["setting a", "method fedavg", "data"]),
        (["settings={a: {train.lr: 0}}"], ["setting a", "method fedavg", "train.lr", "greater than 0"]),
        (["baseline=fedprox"], ["baseline", '"fedprox"', "full"]),
        (["baseline=[full]"], ["baseline"]),
        (["references=[majorty]"], ["references.0", 'did you mean "majority"']),
        (["seeds=0"], ["seeds", "0"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=[1, 1]"], ["seeds", "different"]),
        (["seeds=[-1]"], ["seeds"]),
        (["seeds=true"], ["seeds"]),
        (["seeds=[a]"], ["seeds"]),
        (["seed=x"], ["seeds"]),
        (["metods=[fedavg]"], ["metods", 'did you mean "methods"']),
        (["methods.full.train.lr=1"], ["methods.full.train.lr", "whole"]),
        (["objective=joint", "methods=[fedavg, fedprox]"], ["fedprox", "same configuration", '"fedavg"']),
    ],
)
def test_wrong_comparisons(path, overrides, parts):
    text = message(path, overrides)
    for part in parts:
        assert part in text


def test_one_method_is_no_comparison(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("method: fedavg\n", encoding="utf-8")
    text = message(file)
    assert "one method, fedavg" in text
    assert "methods: [" in text
    assert "no methods" in message(None)


def test_an_unknown_key_of_the_file(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("methods: [fedavg]\nsetings: {}\n", encoding="utf-8")
    assert 'did you mean "settings"' in message(file)
