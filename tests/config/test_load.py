"""Precedence, shorthands, round trips and hashes of configurations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmm.config.explain import explain
from fedmm.config.load import config_hash, dump_config, load_config
from fedmm.config.presets import PRESETS
from fedmm.config.schema import Config
from fedmm.errors import ConfigError


def write(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_file_and_overrides_it_is_the_schema():
    resolved = load_config(None)
    assert resolved.config == Config()
    assert set(resolved.origin.values()) == {"default"}


def test_an_empty_file_is_the_schema(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n")).config == Config()


def test_default_preset_file_command_line(tmp_path):
    path = write(tmp_path, "method: fedprox\nobjective: {mu: 0.5}\ntrain: {rounds: 7, lr: 0.1}\n")
    resolved = load_config(path, ["train.lr=0.2"])
    assert resolved.config.objective.name == "prox"
    assert resolved.config.objective.params == {"mu": 0.5}
    assert resolved.config.train.rounds == 7
    assert resolved.config.train.lr == 0.2
    assert resolved.origin["objective.name"] == "preset fedprox"
    assert resolved.origin["objective.mu"] == f"file {path}"
    assert resolved.origin["train.lr"] == "command line"
    assert resolved.origin["train.momentum"] == "default"


def test_the_file_wins_over_the_preset_whatever_names_the_method(tmp_path):
    path = write(tmp_path, "model: {unimodal_heads: false}\n")
    config = load_config(path, ["method=fedcmi"]).config
    assert config.model.unimodal_heads is False
    assert config.model.projector is not None
    assert config.model.projector.depth == 3


def test_another_objective_drops_the_parameters_of_the_presets():
    config = load_config(None, ["method=cmsfed", "objective=joint"]).config
    assert config.objective.params == {}
    assert config.selection.params == {"theta": 1.5}


def test_another_objective_on_the_command_line_drops_the_files_parameters(tmp_path):
    path = write(tmp_path, "objective: {name: prox, mu: 0.1}\n")
    assert load_config(path, ["objective=infiltration", "objective.kappa=1"]).config.objective.params == {"kappa": 1}


def test_the_same_objective_merges_key_by_key():
    config = load_config(None, ["method=cmsfed-v1", "objective=prototypes", "objective.weak=all"]).config
    assert config.objective.params == {"alpha": 2.0, "variant": "v1", "weak": "all"}


def test_another_data_set_starts_its_section_anew(tmp_path):
    path = write(tmp_path, "data: {name: avdigits, preset: easy, samples: 100}\n")
    resolved = load_config(path, ["data=cgmnist"])
    assert resolved.config.data == Config(data="cgmnist").data
    assert resolved.origin["data.samples"] == "default"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("objective=infiltration", "objective.name", "infiltration"),
        ("scenario.partition=iid", "scenario.partition.name", "iid"),
        ("scenario.modalities=0.5", "scenario.modalities.multimodal", 0.5),
        ("scenario.modalities=1", "scenario.modalities.multimodal", 1.0),
        ("data=avdigits:easy", "data.preset", "easy"),
        ("data=my.package:load", "data.name", "my.package:load"),
        ("engine=ray", "engine.name", "ray"),
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.lr=1", "train.lr", 1.0),
        ("train.clip=null", "train.clip", None),
        ("train.clip=", "train.clip", None),
        ("model.encoder={image: cnn}", "model.encoder", {"image": "cnn"}),
        ("model.encoder.image=cnn", "model.encoder", {"image": "cnn"}),
        ("model.projector={}", "model.projector.depth", 3),
        ("objective.temperature=off", "objective.temperature", "off"),
        ("selection.theta=.inf", "selection.theta", math.inf),
        ("data.params.noise=1e-2", "data.params", {"noise": 0.01}),
        ("faults=[{kind: nan, clients: [1]}]", "faults.0.kind", "nan"),
    ],
)
def test_overrides(override, path, value):
    found = load_config(None, [override]).config
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_dotted_keys_may_follow_a_shorthand_in_any_order():
    ahead = load_config(None, ["scenario.partition=dirichlet", "scenario.partition.alpha=0.1", "engine=ray"])
    behind = load_config(None, ["engine=ray", "scenario.partition.alpha=0.1", "scenario.partition=dirichlet"])
    assert ahead.config == behind.config
    assert ahead.config.scenario.partition.alpha == 0.1


def test_of_two_overrides_for_one_key_the_later_wins():
    assert load_config(None, ["train.lr=1", "train.lr=2", "train={lr: 3}"]).config.train.lr == 3.0


def test_dotted_keys_in_a_file(tmp_path):
    assert load_config(write(tmp_path, "train.lr: 0.5\ntrain: {rounds: 2}\n")).config.train.lr == 0.5


def test_merge_keys_of_yaml(tmp_path):
    path = write(tmp_path, "scenario: &base {clients: 9}\n")
    assert load_config(path).config.scenario.clients == 9


@pytest.mark.parametrize("method", sorted(PRESETS))
def test_every_preset_is_valid_and_comes_back_from_its_dump(method, tmp_path):
    config = load_config(None, [f"method={method}"]).config
    assert config.method == method
    assert load_config(write(tmp_path, dump_config(config))).config == config


def test_presets_differ():
    configs = [load_config(None, [f"method={method}"]).config for method in PRESETS]
    assert len({config_hash(config.model_copy(update={"method": None})) for config in configs}) == len(PRESETS)


# PyYAML itself loses NEL (U+0085) in plain scalars; control characters are no YAML at all.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,9}", fullmatch=True)
REAL = st.floats(allow_nan=False).filter(lambda x: not 3.4e38 < abs(x) < float("inf"))
NUMBER = st.one_of(st.integers(-(10**6), 10**6), REAL)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=6,
)
CONFIGS = st.builds(
    lambda clients, **sections: Config(scenario={"clients": clients, "modalities": 0.5}, **sections),
    clients=st.integers(5, 1000),
    data=st.fixed_dictionaries(
        {"name": TEXT.filter(bool)},
        optional={
            "preset": TEXT,
            "root": TEXT,
            "modalities": st.lists(TEXT, max_size=3),
            "params": st.dictionaries(NAME, VALUE, max_size=3),
        },
    ),
    objective=st.dictionaries(NAME.filter(lambda name: name != "name"), VALUE, max_size=3).flatmap(
        lambda params: NAME.map(lambda name: {"name": name, **params})
    ),
    train=st.fixed_dictionaries({"lr": st.floats(1e-300, 3e38), "rounds": st.integers(1, 10**9)}),
    model=st.fixed_dictionaries({}, optional={"encoder": TEXT | st.dictionaries(NAME, TEXT), "projector": st.none()}),
    faults=st.lists(st.fixed_dictionaries({"kind": st.just("nan"), "rounds": st.lists(st.integers(1, 9))}), max_size=2),
    seed=st.integers(0, 2**63 - 1),
)


@given(CONFIGS)
def test_every_configuration_comes_back_from_its_dump(tmp_path_factory, config):
    path = write(tmp_path_factory.getbasetemp(), dump_config(config), "dump.yaml")
    again = load_config(path).config
    assert again == config
    assert config_hash(again) == config_hash(config)


@given(CONFIGS, CONFIGS)
def test_hashes_are_equal_exactly_for_equal_configurations(one, other):
    assert (config_hash(one) == config_hash(other)) == (one == other)


def test_the_hash_sees_through_order_and_number_form():
    one = load_config(None, ["objective={name: prox, mu: 1, nu: 2}"]).config
    other = load_config(None, ["objective={nu: 2.0, mu: 1.0, name: prox}"]).config
    assert config_hash(one) == config_hash(other)
    assert config_hash(one) != config_hash(Config())


def test_explain_lists_every_value_with_its_origin(tmp_path):
    path = write(tmp_path, "method: fedcmi\nfaults: [{kind: nan}]\n")
    rows = {row.key: row for row in explain(load_config(path, ["train.lr=1e-3"]))}
    assert rows["train.lr"].value == "0.001"
    assert rows["train.lr"].origin == "command line"
    assert rows["model.projector.depth"].origin == "preset fedcmi"
    assert rows["model.projector.hidden"].origin == "default"
    assert rows["faults"].value.startswith("[{kind: nan")
    assert rows["seed"].origin == "default"


def test_preset_names_are_checked_even_when_the_file_says_it_all(tmp_path):
    text = dump_config(Config()).replace("method: null", "method: fedavgg")
    with pytest.raises(ConfigError, match="fedavg"):
        load_config(write(tmp_path, text))
