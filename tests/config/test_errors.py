"""Each wrong configuration is one ConfigError that says where, what was given, what is allowed, and what to do."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedmm.config.load import load_config
from fedmm.config.schema import Config, TrainConfig
from fedmm.errors import ConfigError


def message(path=None, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def outcome(*arguments):
    try:
        return load_config(*arguments).config
    except ConfigError as error:
        return error


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.lr=1", ["trian: ", "command line", 'did you mean "train"']),
        ("train.momentun=0.9", ["train.momentun", 'did you mean "momentum"']),
        ("train.learning_rate=1", ["train.learning_rate", "unknown key", "lr"]),
        ("model.projector.depht=2", ["model.projector.depht", 'did you mean "depth"']),
        ("faults=[{kind: nan, client: 3}]", ["faults.0.client", 'did you mean "clients"']),
        ("train.rounds=ten", ["train.rounds", '"ten"', "a whole number"]),
        ("train.rounds='10'", ["train.rounds", '"10"', "a whole number"]),
        ("train.rounds=2.0", ["train.rounds", "2.0", "a whole number"]),
        ("train.rounds=true", ["train.rounds", "true", "a whole number"]),
        ("train.lr=true", ["train.lr", "true", "a number"]),
        ("train.lr='0.1'", ["train.lr", '"0.1"', "a number"]),
        ("train.lr=.nan", ["train.lr", "finite"]),
        ("train.lr=.inf", ["train.lr", "finite"]),
        ("train.lr=1e39", ["train.lr", "1e+39", "at most 3.4e+38"]),
        ("train.batch_size=9223372036854775808", ["train.batch_size", "at most 9.22e+18"]),
        ("scenario.modalities=true", ["scenario.modalities", "true", "a number"]),
        ("scenario.partition.alpha=0", ["scenario.partition.alpha", "greater than 0"]),
        ("scenario.partition.alpha=-1", ["scenario.partition.alpha", "-1", "greater than 0"]),
        ("scenario.modalities=1.5", ["scenario.modalities.multimodal", "1.5", "less than or equal to 1"]),
        ("scenario.partition=dirichlett", ["scenario.partition.name", 'did you mean "dirichlet"', "pathological"]),
        ("engine=raj", ["engine.name", "inproc, ray, flower", 'did you mean "ray"']),
        ("evaluate.probe=off", ["evaluate.probe", '"off"', "true or false"]),
        ("train=5", ["train", "5", "a mapping with rounds"]),
        ("scenario=", ["scenario", "nothing", "a mapping with clients"]),
        ("model.encoder=5", ["model.encoder", "5", "text or a mapping"]),
        ("model.encoder.image=5", ["model.encoder.image", "5", "text"]),
        ("data.modalities=image", ["data.modalities", '"image"', "a list"]),
        ("data.modalities=[image, 3]", ["data.modalities.1", "3", "text"]),
        ("objective.name=3", ["objective.name", "3", "text"]),
        ("faults=[{clients: [1]}]", ["faults.0.kind", "missing"]),
        ("seed=-1", ["seed", "-1", "greater than or equal to 0"]),
        ("train.clients_per_round=21", ["train.clients_per_round", "21", "scenario.clients", "20"]),
        ("method=fedcm", ["method", '"fedcm"', 'did you mean "fedcmi"']),
        ("method=[fedavg]", ["method", "fedavg"]),
        ("train.lr", ["train.lr", "key=value"]),
        ("=1", ["=1", "key"]),
        ("train..lr=1", ["train..lr", "key"]),
        ("train.lr=[1", ["train.lr", "quotes"]),
        ("data.root=@home", ["data.root", "quotes"]),
        ("train={lr: 1, lr: 2}", ["train", '"lr"', "twice"]),
        ("train={lr: 1, .lr: 2}", ["train..lr", "not a key"]),
        ("data.params={1: 2}", ["data.params", "not text"]),
        ("data.params=&a [*a]", ["data.params", "recursive"]),
        ("data.root=!!python/name:os.system", ["data.root", "tag"]),
        ("seeds=3", ["seeds"]),
    ],
)
def test_wrong_overrides(override, parts):
    text = message(overrides=[override])
    for part in parts:
        assert part in text


def test_all_problems_are_listed_at_once():
    text = message(overrides=["train.rounds=x", "trian=3", "scenario.partition.alpha=0"])
    assert "3 problems" in text
    assert all(part in text for part in ("train.rounds", "trian", "scenario.partition.alpha"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"train:\n  lr: 0.1\n  lr: 0.2\n", ["line 3", '"lr"', "twice"]),
        (b"a: 1\ntrain:\n\tlr: 1\n", ["line 3", "spaces"]),
        (b"method: fedavg\ntrain: {lr: 1\n", ["line 3"]),
        (b"- fedavg\n", ["a list", "mapping"]),
        (b"fedavg\n", ["text", "mapping"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"a: \x00\n", ["YAML"]),
        (b"train.lr: 1\ntrain: {lr: 2}\n", ["train.lr", "twice"]),
        (b"--- {}\n--- {}\n", ["line 2"]),
        (b"[" * 5000, ["nested too deeply"]),
        (b"methods: [fedavg]\n", ["methods", "fedmm compare"]),
        (b"train: {rounds: x}\n", ["train.rounds", "in file", "a whole number"]),
    ],
)
def test_wrong_files(tmp_path, content, parts):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    text = message(path)
    for part in ("wrong.yaml", *parts):
        assert part in text


def test_a_missing_file_and_a_directory(tmp_path):
    assert "no such file" in message(tmp_path / "none.yaml")
    assert str(tmp_path) in message(tmp_path)
    assert "cannot be read" in message(tmp_path)


KEYS = sorted(TrainConfig.model_fields)


@given(st.sampled_from(KEYS), st.integers(0, 30), st.sampled_from("abcdefgxyz_"))
def test_a_misspelt_key_is_refused_and_the_key_meant_is_shown(key, at, letter):
    at %= len(key)
    for wrong in (key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]):
        if not wrong or wrong in KEYS:
            continue
        text = message(overrides=[f"train.{wrong}=1"])
        assert f"train.{wrong}" in text
        assert key in text or "did you mean" in text


@given(st.text(max_size=20), st.text(max_size=20))
def test_whatever_is_typed_gives_a_configuration_or_a_config_error(key, value):
    assume("\x00" not in key)
    assert isinstance(outcome(None, [f"{key}={value}"]), Config | ConfigError)


@given(
    st.sampled_from(["train.rounds", "train.lr", "scenario", "data.modalities", "model.encoder", "objective"]),
    st.text(),
)
def test_whatever_value_is_given_to_a_real_key_is_taken_or_refused(key, value):
    assert isinstance(outcome(None, [f"{key}={value}"]), Config | ConfigError)


@given(st.binary(max_size=60))
def test_whatever_a_file_holds_gives_a_configuration_or_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    found = outcome(path)
    assert isinstance(found, Config) or "fuzz.yaml" in str(found)
