"""Straight through against interrupted and resumed: same weights, same measurements."""

import pytest
import tiny

from experiments.runner import run as run_recorded
from fedmm.errors import CheckpointError, ConfigError
from fedmm.io.run_directory import read_metrics

VARIANTS = {
    "fedavg": {},
    "fedcmi": {"objective__dominance": "round_global"},
    "cmsfed": {"scenario__modalities__multimodal": 0.7},
    "power-of-choice": {"evaluate__choose": "best", "evaluate__probe": True},
}


def settings(method, **more):
    return tiny.config(method, train__rounds=6, **VARIANTS[method], **more)


def stable(path):
    return sorted(map(str, tiny.rows(path)))


@pytest.mark.parametrize("method", VARIANTS)
def test_resumed_equals_straight(tmp_path, method):
    straight = tiny.run(tmp_path / "straight", settings(method))
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", settings(method), callbacks=[tiny.StopAfter(3)])
    assert max(r["round"] for r in tiny.rows(tmp_path / "broken")) == 3
    resumed = tiny.run(tmp_path / "broken", settings(method), resume=True)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert tiny.rows(tmp_path / "broken") == tiny.rows(tmp_path / "straight")
    for summary in (straight, resumed):
        summary.pop("seconds")
    assert resumed == straight
    assert read_metrics(tmp_path / "broken").equals(read_metrics(tmp_path / "straight"))


@pytest.mark.parametrize("every", [1, 2, 4])
def test_resumption_goes_back_to_the_last_checkpoint(tmp_path, every):
    config = settings("cmsfed", checkpoint__every=every)
    straight = tiny.run(tmp_path / "straight", config)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", config, callbacks=[tiny.StopAfter(3)])
    resumed = tiny.run(tmp_path / "broken", config, resume=True)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert tiny.rows(tmp_path / "broken") == tiny.rows(tmp_path / "straight")
    assert resumed["bytes_up"] == straight["bytes_up"]
    assert resumed["replies_used"] == straight["replies_used"]


def test_interrupted_twice(tmp_path):
    config = settings("cmsfed")
    straight = tiny.run(tmp_path / "straight", config)
    for resume, last in ((False, 1), (True, 4)):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / "broken", config, callbacks=[tiny.StopAfter(last)], resume=resume)
    resumed = tiny.run(tmp_path / "broken", config, resume=True)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert tiny.rows(tmp_path / "broken") == tiny.rows(tmp_path / "straight")


def test_refusals_and_quarantine_survive_an_interruption(tmp_path):
    config = tiny.config(
        "fedavg",
        train__rounds=6,
        train__clients_per_round=6,
        faults=[{"kind": "nan", "clients": [3], "rounds": [2, 3], "attempts": 99}],
        policy__on_short="accept",
        policy__retries=0,
        policy__quarantine_after=2,
        policy__quarantine_rounds=2,
    )
    straight = tiny.run(tmp_path / "straight", config)
    for last in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(tmp_path / str(last), config, callbacks=[tiny.StopAfter(last)])
        resumed = tiny.run(tmp_path / str(last), config, resume=True)
        assert resumed["weights_sha256"] == straight["weights_sha256"]
        assert tiny.manifest(tmp_path / str(last))["events"] == tiny.manifest(tmp_path / "straight")["events"]


def test_a_half_written_line_of_measurements_is_made_again(tmp_path):
    config = settings("fedavg")
    straight = tiny.run(tmp_path / "straight", config)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", config, callbacks=[tiny.StopAfter(3)])
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as handle:
        handle.write('{"round": 4, "split": "tra')
    assert tiny.run(tmp_path / "broken", config, resume=True)["weights_sha256"] == straight["weights_sha256"]
    assert tiny.rows(tmp_path / "broken") == tiny.rows(tmp_path / "straight")


def test_a_corrupt_checkpoint_stops_the_resumption(tmp_path):
    config = settings("fedavg")
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, config, callbacks=[tiny.StopAfter(3)])
    path = tmp_path / "checkpoints" / "round-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match="round-000003"):
        tiny.run(tmp_path, config, resume=True)
    path.unlink()
    path.with_suffix(".json").unlink()
    straight = tiny.run(tmp_path.parent / "straight", config)
    assert tiny.run(tmp_path, config, resume=True)["weights_sha256"] == straight["weights_sha256"]


def test_another_configuration_is_not_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path, settings("fedavg"), callbacks=[tiny.StopAfter(1)])
    with pytest.raises(ConfigError, match="train"):
        tiny.run(tmp_path, settings("fedavg", train__lr=0.5), resume=True)
    with pytest.raises(ConfigError, match="--resume"):
        tiny.run(tmp_path, settings("fedavg"))


def test_a_finished_run_is_not_run_again(tmp_path):
    config = settings("fedavg")
    first = run_recorded(config, tmp_path)
    again = run_recorded(config, tmp_path, resume=True)
    assert again == first
