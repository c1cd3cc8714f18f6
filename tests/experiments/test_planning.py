"""`fedmm plan`: bytes equal those that a real run meters, the time is near, and nothing is left behind."""

import json
import tempfile
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.planning import forecast
from experiments.runner import run
from experiments.volumes import volumes
from fedmm.config.load import load_config
from fedmm.data.federation import build_federation
from fedmm.engines.costs import training_flops
from fedmm.engines.devices import PRESETS
from server.plan import plan

TINY = [
    "data=synthetic",
    "data.samples=300",
    "scenario.clients=8",
    "train.clients_per_round=3",
    "train.rounds=3",
    "train.local_epochs=1",
    "model.features=8",
]
HALF = "scenario.modalities.multimodal=0.5"


def config(*overrides):
    return load_config(None, [*TINY, *overrides]).config


def counted(settings):
    prepared = plan(settings)
    return volumes(prepared, build_federation(prepared.dataset, settings.scenario, settings.seed))


def metered(settings, out):
    """(down, up) of summary.json, and (round, direction, block) -> bytes of metrics.jsonl."""
    summary = run(settings, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    blocks = {(r["round"], r["metric"], r["modality"]): r["value"] for r in rows if r["scope"] == "block"}
    return (summary["bytes_down"], summary["bytes_up"]), blocks


def by_round(found):
    rounds = {0: found.bootstrap} if found.bootstrap else {}
    rounds |= dict(enumerate(found.rounds, 1))
    return {
        (number, f"bytes_{name}", block): size
        for number, traffic in rounds.items()
        for name, part in (("down", traffic.down), ("up", traffic.up))
        for block, size in part.items()
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=fedavg", HALF],
        ["method=fedavg", "evaluate.every=2", "evaluate.probe=false"],
        ["method=fedcmi", HALF, "scenario.modalities.heldout=owned"],
        ["method=fedproto", HALF],
        ["method=mnl"],
        ["method=arm", "data.params.modalities=3"],
        ["method=ogm-ge", "model.norm=none"],
        ["method=divfl"],
        ["method=scaffold", HALF],
        ["method=cmsfed", "selection.theta=.inf"],
        ["method=cmsfed", HALF, "train.clients_per_round=8", "selection.theta=.inf"],
        ["method=power-of-choice"],
        ["method=modality-wise", HALF],
        ["method=mfedmc", "objective.gamma=2"],
        ["method=fedavg", "data=cgmnist", "data.samples=300"],
        ["method=fedavg-aux", "observe.every=2", HALF],
        ["method=fedavg", "observe.every=1", "observe.split=train", "data.params.modalities=5", HALF],
        ["method=ogm-ge", "observe.every=2", HALF],
        ["method=mnl", "observe.every=1", "observe.what=[method]"],
    ],
    ids=" ".join,
)
def test_bytes_are_those_of_the_run(tmp_path, overrides):
    settings = config(*overrides)
    found = counted(settings)
    totals, blocks = metered(settings, tmp_path)
    assert found.exact
    assert not found.words
    assert (sum(found.run.down.values()), sum(found.run.up.values())) == totals == found.least == found.most
    assert by_round(found) == blocks


BUFFERED = "devices={classes: {phone: 0.6, tablet: 0.4}, mode: buffered, buffer: {size: 2, concurrency: 4}}"


def test_a_buffer_counts_its_own_replies(tmp_path):
    """Drop-outs change nothing: a version is made when the buffer is full."""
    settings = config("method=fedavg", BUFFERED)
    found = counted(settings)
    totals, blocks = metered(settings, tmp_path)
    assert found.exact
    assert (sum(found.run.down.values()), sum(found.run.up.values())) == totals == found.least == found.most
    assert by_round(found) == blocks
    record = forecast(settings).record()
    simulated = json.loads((tmp_path / "summary.json").read_text())["simulated_seconds"]
    assert abs(np.log(record["seconds"]["devices"] / simulated)) < np.log(3)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["method=cmsfed", "selection.theta=0.2"], "weak modality alone"),
        (["method=cmsfed", HALF, "selection.theta=0.2"], "random pick"),
        (["method=divfl", HALF], "random pick"),
        (["method=power-of-choice", HALF], "random pick"),
        (["method=mfedmc"], "own choice"),
        (["method=mfedmc", "data.params.modalities=3", "objective.gamma=2", HALF], "own choice"),
        (["method=remix"], "batches of all its modalities"),
        ([BUFFERED, HALF], "the queue of devices decides"),
        (["model.width=16", "devices={classes: {small: {like: gateway, width: 0.5}}}"], "a part of the model"),
    ],
)
def test_what_the_run_decides_is_bounded_and_said(tmp_path, overrides, word):
    settings = config(*overrides)
    found = counted(settings)
    totals, _ = metered(settings, tmp_path)
    assert not found.exact
    assert any(word in text for text in found.words)
    for direction in range(2):
        assert found.least[direction] <= totals[direction] <= found.most[direction]


def test_weak_only_picks_send_less(tmp_path):
    settings = config("method=cmsfed", "selection.theta=1e-6")  # everybody trains one modality alone
    found = counted(settings)
    (down, up), _ = metered(settings, tmp_path)
    assert down == sum(found.run.down.values())
    assert up < sum(found.run.up.values())
    assert up >= found.least[1]


def test_the_final_look_is_counted_apart():
    with_probes, without = counted(config()).final, counted(config("evaluate.probe=false")).final
    assert with_probes.down["broadcast"] > 0
    assert "broadcast" not in without.down
    assert with_probes.up["report"] > without.up["report"]


def test_a_forecast_is_whole_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = forecast(config("method=cmsfed"))
    assert not list(tmp_path.iterdir())
    record = json.loads(json.dumps(found.record()))
    assert record["parameters"]["total"] == sum(record["parameters"]["blocks"].values())
    assert record["bytes"]["down"] == sum(record["bytes"]["blocks"]["down"].values())
    assert len(record["bytes"]["by_round"]) == 3
    assert record["bytes"]["bootstrap"]["down"]
    memory, seconds = record["memory"], record["seconds"]
    assert memory["total"] >= memory["rehearsed"] >= memory["base"] > 50e6
    assert memory["training"] > 4 * memory["model"]  # a stack of four
    assert memory["measuring"] > 0
    parts = ("start", "bootstrap", "rounds", "evaluations", "final")
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts))
    assert all(seconds[part] > 0 for part in parts)
    assert seconds["rehearsed"]
    assert record["layout"]["largest"] == 4


def test_a_place_for_the_rehearsal_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    result = CliRunner().invoke(app, ["plan", *TINY])
    assert result.exit_code == 4
    assert "fedmm: /proc: the rehearsal cannot write here" in result.stderr
    assert "TMPDIR" in result.stderr


def test_time_without_a_rehearsal(monkeypatch):
    monkeypatch.setattr("experiments.rehearsal.REHEARSAL_S", 0.0)
    seconds = forecast(config("method=cmsfed", "train.rounds=30")).seconds
    assert not seconds.rehearsed
    assert seconds.rounds == pytest.approx(30 * seconds.round)
    assert seconds.bootstrap > 0
    assert seconds.evaluations == pytest.approx(30 * seconds.evaluation)


def test_a_small_last_batch_is_not_counted_as_a_whole_one(monkeypatch):
    # Steps of a second whatever is in them. Clients of many batches: by samples, an epoch takes a second a full batch.
    monkeypatch.setattr("experiments.rehearsal.REHEARSAL_S", 0.0)
    monkeypatch.setattr("experiments.rehearsal.step_seconds", lambda *_, **__: 1.0)
    settings = config("data.samples=2000", "scenario.clients=4", "train.clients_per_round=4", "train.batch_size=16")
    found = forecast(settings).seconds
    sizes = build_federation(plan(settings).dataset, settings.scenario, settings.seed).indices["train"]
    samples = sum(len(rows) for rows in sizes)
    assert min(map(len, sizes)) > 4 * 16
    assert found.round == pytest.approx(settings.train.local_epochs * samples / 16, rel=1e-6)


def test_devices_take_the_time_of_the_slowest_pick():
    settings = config("devices=phone", "train.clients_per_round=8")
    prepared = plan(settings)
    federation = build_federation(prepared.dataset, settings.scenario, settings.seed)
    down, up = counted(settings).message
    phone, samples = PRESETS["phone"], max(len(rows) for rows in federation.indices["train"])
    flops = training_flops(prepared.model, prepared.dataset.specs, prepared.dataset.modalities)
    slowest = down / phone.down_bytes_s + up / phone.up_bytes_s + samples * flops / phone.flops_s
    assert forecast(settings).seconds.devices == pytest.approx(3 * slowest)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plan", *TINY])
    assert result.exit_code == 0, result.output
    down = sum(counted(config()).run.down.values())
    assert f"{down:,}" in result.stdout
    for word in ("rounds", "exact", "encoder.m1", "head.joint", "samples", "seconds", "one by one"):
        assert word in result.stdout
    again = CliRunner().invoke(app, ["plan", *TINY, "--json"])
    assert json.loads(again.stdout)["bytes"]["down"] == down
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "code", "part"),
    [
        (["trian.lr=1"], 2, "did you mean"),
        (["objective=joynt"], 2, "joynt"),
        (["method=cmsfed", "data.modalities=[m1]"], 2, "at least 2 modalities"),
        (["data=avdigits", "data.root=none"], 3, "none"),
        (["none.yaml"], 2, "no such file"),
    ],
)
def test_what_a_run_refuses_is_refused(overrides, code, part):
    result = CliRunner().invoke(app, ["plan", *overrides])
    assert result.exit_code == code
    assert part in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["inproc", "ray"])
@pytest.mark.parametrize("overrides", [["data=avdigits"], ["data=synthetic", "method=cmsfed"]], ids=" ".join)
def test_the_time_is_near(tmp_path, engine, overrides):
    settings = load_config(None, [*overrides, "train.rounds=8", f"engine={engine}"]).config
    foreseen = forecast(settings).seconds.total
    began = time.perf_counter()
    run(settings, tmp_path / "run")
    # The machine may be busy with something else during one of the two.
    assert abs(np.log(foreseen / (time.perf_counter() - began))) < np.log(3)
