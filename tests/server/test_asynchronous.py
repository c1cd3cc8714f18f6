"""Buffered asynchronous training against the equation by hand, interruption, engines and refusals."""

import pytest
import tiny
import torch

from clients.trainer import LocalSchedule, train
from clients.workspace import Workspace
from experiments.runner import CLIENT_APP
from fedmm.engines.buffered import BufferedRun
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import ConfigError
from fedmm.io.checkpoint import load_checkpoint
from fedmm.spec import client_spec
from server.aggregation import Update
from server.asynchronous import Arrived, buffered_mean
from server.plan import check

BUFFERED = {
    "classes": {"phone": 0.5, "gateway": 0.5},
    "spread": 1.0,
    "mode": "buffered",
    "buffer": {"size": 3, "concurrency": 5},
}


def settings(method="fedavg", rounds=6, **changes):
    return tiny.config(method, train__rounds=rounds, devices=BUFFERED, **changes)


def test_versions_are_those_of_the_algorithm_written_out(tmp_path):
    config = settings(rounds=4)
    tiny.run(tmp_path / "run", config)
    server = tiny.server(tmp_path / "again", config)
    server._connect()
    timing, devices = server.timing, config.devices
    picks = server.asynchronous._picks
    expected = server._collector.expectations(server.model)
    work = {k: timing.work(p, server._parcel(), expected(p), 1) for k, p in picks.items()}
    queue = BufferedRun(timing.fleet, work, devices.buffer, config.seed)
    here = Workspace(client_spec(config), None)
    versions = [{n: t.clone() for n, t in server.model.items()}]
    stale = 0
    for _ in range(4):
        step = next(queue)
        changes, total = {n: torch.zeros_like(t) for n, t in versions[0].items()}, 0
        for entry in step.entries:
            start = versions[entry.start_version]
            data = here.data(entry.client, "train")
            result = train(
                here.load(start),
                here.objective,
                data,
                picks[entry.client].modalities,
                {"round": torch.tensor(entry.start_version)},
                LocalSchedule(1, 16, config.train.lr, config.train.momentum, config.train.weight_decay),
                config.seed,
                entry.task + 1,
                entry.client,
            )
            total += len(data)
            stale += entry.staleness
            for n, t in result.model.items():
                changes[n] += len(data) * (1 + entry.staleness) ** -0.5 * (t - start[n])
        versions.append({n: t + changes[n] / total for n, t in versions[-1].items()})
    assert stale > 0
    saved = load_checkpoint(tmp_path / "run" / "checkpoints").tensors
    tiny.assert_close({n.removeprefix("model/"): t for n, t in saved.items() if n.startswith("model/")}, versions[-1])


def update(client, samples, **tensors):
    model = {n.replace("__", "."): torch.tensor(t) for n, t in tensors.items()}
    return Update(client, samples, ("a",), model, {}, 0.0, True)


def test_a_block_moves_by_the_mean_change_of_those_who_trained_it():
    current = {"head.joint.weight": torch.tensor([10.0]), "encoder.a.weight": torch.tensor([5.0])}
    old = {"head.joint.weight": torch.tensor([8.0]), "encoder.a.weight": torch.tensor([4.0])}
    buffer = [
        Arrived(update(0, 30, head__joint__weight=[11.0], encoder__a__weight=[6.0]), current, 1.0),
        Arrived(update(1, 10, head__joint__weight=[4.0]), old, 0.5),
    ]
    found = buffered_mean(current, buffer)
    assert float(found["head.joint.weight"]) == pytest.approx(10 + (30 * 1.0 + 10 * 0.5 * (4 - 8)) / 40)
    assert float(found["encoder.a.weight"]) == pytest.approx(6.0)
    assert buffered_mean(current, buffer, min_owners=2)["encoder.a.weight"] is current["encoder.a.weight"]


def test_a_round_counts_a_version_and_time_goes_on(tmp_path):
    summary = tiny.run(tmp_path, settings())
    rows = tiny.rows(tmp_path)
    seconds = [r["value"] for r in rows if r["metric"] == "simulated_seconds"]
    assert len(seconds) == summary["rounds"] == 6
    assert seconds == sorted(seconds)
    assert summary["simulated_seconds"] == seconds[-1]
    assert summary["replies_used"] == summary["replies_expected"] == 6 * 3
    assert sum(r["value"] for r in rows if r["metric"] == "staleness") > 0
    assert summary["time_to_accuracy"].keys() == {"0.5", "0.6", "0.7", "0.8", "0.9"}


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path, stop):
    whole = tiny.run(tmp_path / "whole", settings())
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "parts", settings(), callbacks=[tiny.StopAfter(stop)])
    parts = tiny.run(tmp_path / "parts", settings(), resume=True)
    timeless = [{k: v for k, v in s.items() if k != "seconds"} for s in (whole, parts)]
    assert timeless[0] == timeless[1]
    assert tiny.rows(tmp_path / "whole") == tiny.rows(tmp_path / "parts")


@pytest.mark.parametrize("method", ["fedavg", "fedcmi"])
def test_messages_and_jobs_give_the_same_bits(tmp_path, method):
    jobs = tiny.run(tmp_path / "jobs", settings(method))
    messages = tiny.run(tmp_path / "messages", settings(method), grid=InProcessGrid(CLIENT_APP, 6))
    assert jobs["weights_sha256"] == messages["weights_sha256"]


@pytest.mark.slow
def test_ray_gives_the_bits_of_this_process(tmp_path):
    from experiments.runner import run

    config = settings()
    here = tiny.run(tmp_path / "here", config)
    ray = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "ray", "workers": 2})})
    assert run(ray, tmp_path / "ray")["weights_sha256"] == here["weights_sha256"]


def test_a_faulty_update_is_left_out_of_its_version(tmp_path):
    faults = [{"kind": "nan", "clients": [0, 1], "attempts": 9}]
    lenient = {"policy__min_replies": 0.1, "policy__on_short": "skip"}
    summary = tiny.run(tmp_path, settings(faults=faults, **lenient))
    assert summary["status"] == "degraded"
    assert 0 < summary["replies_used"] < summary["replies_expected"]
    assert {e["client"] for e in tiny.manifest(tmp_path)["events"] if e["kind"] == "finite"} <= {0, 1}


@pytest.mark.parametrize(
    ("method", "changes", "match"),
    [
        ("cmsfed", {}, r"devices\.mode.*cmsfed"),
        ("fedavg", {"selection__name": "power_of_choice"}, r"devices\.mode.*power_of_choice"),
        ("fedavg", {"objective__name": "prototypes"}, r"devices\.mode.*prototypes"),
        ("fedavg", {"policy__quarantine_after": 2}, r"policy\.quarantine_after"),
    ],
)
def test_what_needs_rounds_is_refused_before_data_are_loaded(method, changes, match):
    with pytest.raises(ConfigError, match=match):
        check(settings(method, **changes))


def test_more_concurrent_clients_than_there_are(tmp_path):
    devices = BUFFERED | {"buffer": {"size": 2, "concurrency": 7}}
    with pytest.raises(ConfigError, match=r"devices\.buffer\.concurrency"):
        check(tiny.config("fedavg", devices=devices))
