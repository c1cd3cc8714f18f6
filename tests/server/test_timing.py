"""Heterogeneous devices: simulated time decides whose replies count, and all else goes on as in any run."""

import pytest
import tiny
import torch

from experiments.runner import CLIENT_APP
from fedmm.engines.clock import Work, task_seconds
from fedmm.engines.costs import training_flops
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import ConfigError, RunError
from fedmm.models import bytes_per_block
from server.plan import check, plan

EVERYONE = {"train__clients_per_round": 6}
LENIENT = {"policy__min_replies": 0.1, "policy__on_short": "skip"}
STEADY = {"flops_s": 1e9, "memory_bytes": 2**30, "up_bytes_s": 1e6, "down_bytes_s": 1e6}
"""A device that never fails; the tiny model takes some 4 ms each way."""

SLOW = STEADY | {"up_bytes_s": 1e3, "down_bytes_s": 1e3}


def fleet(*slow, **section):
    """Six steady clients, of which some are slow."""
    clients = [{"client": k, "device": "slow"} for k in slow]
    classes = {"steady": STEADY | {"count": 6 - len(slow)}, "slow": SLOW | {"count": 0}}
    return {"devices": {"classes": classes, "clients": clients} | section}


def metric(path, name):
    return {r["round"]: r["value"] for r in tiny.rows(path) if r["metric"] == name}


def clients_of(path):
    return {round: sorted(clients) for round, clients in tiny.selected(path).items()}


def lost(path):
    """(round, kind, clients) of every event of a device."""
    return [
        (e["round"], e["kind"], [int(k) for k in e["reason"].split("client ")[1].split(", ")])
        for e in tiny.manifest(path)["events"]
        if "client " in e["reason"] and e["client"] is None
    ]


@pytest.mark.parametrize("method", ["fedavg", "cmsfed"])
def test_devices_that_never_fail_change_no_bit(tmp_path, method):
    without = tiny.run(tmp_path / "without", tiny.config(method))
    with_them = tiny.run(tmp_path / "with", tiny.config(method, **fleet(0, 1)))
    assert with_them["weights_sha256"] == without["weights_sha256"]
    assert (with_them["bytes_up"], with_them["bytes_down"]) == (without["bytes_up"], without["bytes_down"])
    assert "simulated_seconds" not in without


def test_seconds_and_bytes_of_a_round_by_hand(tmp_path):
    config = tiny.config("fedavg", train__rounds=1, train__local_epochs=2, **EVERYONE, **fleet(4))
    summary = tiny.run(tmp_path, config)
    made = plan(config)
    size = sum(bytes_per_block(made.model.state_dict()).values())
    samples = [sum(c) for c in tiny.manifest(tmp_path)["federation"]["class_counts"]["train"]]
    flops = training_flops(made.model, made.dataset.specs, made.dataset.modalities)
    slowest = task_seconds(made.fleet[4], Work(samples[4], 2, flops, size, size))
    assert summary["simulated_seconds"] == pytest.approx(slowest)
    assert summary["simulated_bytes_up"] == summary["simulated_bytes_down"] == 6 * size
    assert metric(tmp_path, "simulated_seconds") == {1: summary["simulated_seconds"]}


def test_the_deadline_drops_the_slow(tmp_path):
    config = tiny.config("fedavg", **EVERYONE, **LENIENT, **fleet(1, 3, deadline_s=0.5))
    summary = tiny.run(tmp_path, config)
    assert clients_of(tmp_path) == {1: [0, 2, 4, 5], 2: [0, 2, 4, 5]}
    assert lost(tmp_path) == [(r, "straggler", [1, 3]) for r in (1, 2)]
    assert {e["decision"] for e in tiny.manifest(tmp_path)["events"]} == {"left out of the round"}
    assert summary["simulated_seconds"] == pytest.approx(2 * 0.5)
    assert (summary["replies_used"], summary["replies_expected"], summary["status"]) == (8, 12, "degraded")
    # What the slow were sent until the deadline is spent all the same.
    size = sum(bytes_per_block(plan(config).model.state_dict()).values())
    assert summary["simulated_bytes_down"] == 8 * size + 4 * 500
    assert summary["simulated_bytes_up"] == 8 * size


def test_nobody_computes_for_nothing(tmp_path):
    """A client whose reply will be late is not even asked: the payload counts the others alone."""
    late = tiny.run(
        tmp_path, tiny.config("fedavg", evaluate__every=9, **EVERYONE, **LENIENT, **fleet(1, deadline_s=0.5))
    )
    size = sum(bytes_per_block(plan(tiny.config("fedavg")).model.state_dict()).values())
    up = sum(r["value"] for r in tiny.rows(tmp_path) if r["metric"] == "bytes_up" and r["modality"] != "report")
    assert up == late["replies_used"] * size == 10 * size


def test_a_strict_policy_ends_a_round_that_falls_short(tmp_path):
    with pytest.raises(RunError, match="5 of 6") as caught:
        tiny.run(tmp_path, tiny.config("fedavg", **EVERYONE, **fleet(1, deadline_s=0.5)))
    assert "round 1" in str(caught.value)


def test_over_selection_keeps_the_round_full_and_leaves_the_slow_behind(tmp_path):
    config = tiny.config("fedavg", train__clients_per_round=4, **fleet(2, 5, over_selection=1.5))
    summary = tiny.run(tmp_path, config)
    assert clients_of(tmp_path) == {1: [0, 1, 3, 4], 2: [0, 1, 3, 4]}
    assert lost(tmp_path) == [(r, "straggler", [2, 5]) for r in (1, 2)]
    assert (summary["status"], summary["replies_used"]) == ("completed", 8)


def test_dropouts_are_counted_and_recorded(tmp_path):
    section = {"devices": {"classes": {"flaky": STEADY | {"dropout": 0.5}}}}
    summary = tiny.run(tmp_path, tiny.config("fedavg", train__rounds=8, **EVERYONE, **LENIENT, **section))
    count = sum(len(clients) for _, kind, clients in lost(tmp_path) if kind == "dropout")
    assert count == sum(metric(tmp_path, "dropouts").values()) == 48 - summary["replies_used"]
    assert 12 <= count <= 36  # 24 expected, standard deviation 3.5


def test_clients_that_are_away_are_not_asked(tmp_path):
    away = {"kind": "trace", "windows_s": [[1e5, 2e5]]}
    section = fleet(deadline_s=10)
    section["devices"]["clients"] = [{"client": k, "availability": away} for k in (0, 2)]
    tiny.run(tmp_path, tiny.config("fedavg", train__clients_per_round=4, train__rounds=3, **section))
    assert set(map(tuple, clients_of(tmp_path).values())) == {(1, 3, 4, 5)}


def test_the_server_waits_for_devices_to_come(tmp_path):
    section = fleet()
    late = {"kind": "trace", "windows_s": [[500.0, 1e9]]}
    section["devices"]["clients"] = [{"client": k, "availability": late} for k in (0, 1, 2, 3)]
    summary = tiny.run(tmp_path, tiny.config("fedavg", train__rounds=1, **section))
    assert 500 < summary["simulated_seconds"] < 501


def test_a_battery_below_its_reserve_rests(tmp_path):
    battery = {"capacity_j": 1.0, "compute_w": 0.0, "radio_j_byte": 1e-5, "recharge_w": 0.0, "reserve": 0.95}
    section = fleet()
    section["devices"]["clients"] = [{"client": 3, "battery": battery}]
    summary = tiny.run(tmp_path, tiny.config("fedavg", train__rounds=3, **EVERYONE, **LENIENT, **section))
    # The first task takes some 0.07 J of 1 J, which is more than the reserve leaves.
    assert [3 in found for found in clients_of(tmp_path).values()] == [True, False, False]
    assert summary["simulated_energy_j"] == pytest.approx(metric(tmp_path, "simulated_energy_j")[1])


MIXED = {
    "classes": {"phone": {"share": 0.5, "batch_size": 8, "local_epochs": 3}, "gateway": {"share": 0.5, "dropout": 0.2}},
    "spread": 0.5,
    "over_selection": 1.4,
    "targets": [0.01, 1.0],
}


@pytest.mark.parametrize("method", ["fedavg", "cmsfed"])
def test_an_interrupted_run_goes_on_with_the_same_bits_and_the_same_time(tmp_path, method):
    settings = tiny.config(method, train__rounds=6, devices=MIXED, **LENIENT)
    whole = tiny.run(tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "parts", settings, callbacks=[tiny.StopAfter(3)])
    parts = tiny.run(tmp_path / "parts", settings, resume=True)
    timeless = [{k: v for k, v in s.items() if k != "seconds"} for s in (whole, parts)]
    assert timeless[0] == timeless[1]
    assert tiny.rows(tmp_path / "whole") == tiny.rows(tmp_path / "parts")


def test_messages_and_jobs_mean_the_same(tmp_path):
    settings = tiny.config("fedavg", train__rounds=3, devices=MIXED, **LENIENT)
    jobs = tiny.run(tmp_path / "jobs", settings)
    grid = InProcessGrid(CLIENT_APP, settings.scenario.clients)
    messages = tiny.run(tmp_path / "messages", settings, grid=grid)
    assert jobs["weights_sha256"] == messages["weights_sha256"]
    assert jobs["simulated_seconds"] == messages["simulated_seconds"]


def test_epochs_and_batches_of_a_client_are_its_own(tmp_path):
    own = [{"client": 1, "local_epochs": 3}, {"client": 4, "batch_size": 4}]
    section = fleet()
    section["devices"]["clients"] = own
    settings = tiny.config("fedavg", train__rounds=1, **EVERYONE, **section)
    server = tiny.server(tmp_path, settings)
    server._connect()
    updates = {u.client: u for u in server._collect(server._select(1), 1, 1)}
    for k, u in updates.items():
        epochs, batch = {1: (3, 16), 4: (1, 4)}.get(k, (1, 16))
        assert u.steps == epochs * -(-u.samples // batch)
    for u in server._collect(server._select(1), 0, 1):
        assert u.steps == -(-u.samples // (4 if u.client == 4 else 16)), "the bootstrap is one epoch"


# -- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "fedcmi", "cmsfed"])
def test_a_device_in_bfloat16_trains_nearly_as_the_others(tmp_path, method):
    section = fleet()
    section["devices"]["clients"] = [{"client": k, "precision": "bfloat16"} for k in (1, 2)]
    found = []
    for devices in ({}, section):
        settings = tiny.config(method, **EVERYONE, **devices)
        grid = InProcessGrid(CLIENT_APP, settings.scenario.clients)  # messages: every update keeps its model
        server = tiny.server(tmp_path / f"{len(found)}", settings, grid)
        server._connect()
        if server.round < 0:
            server._bootstrap()
        found.append({u.client: u for u in server._collect(server._select(1), 1, 1)})
    exact, mixed = found
    start = plan(tiny.config(method)).model.state_dict()
    for k in exact:
        same = [torch.equal(exact[k].model[n], mixed[k].model[n]) for n in exact[k].model]
        assert all(t.dtype == torch.float32 for t in mixed[k].model.values())
        if k not in (1, 2):
            continue
        assert not all(same)
        for n, t in mixed[k].model.items():
            assert torch.equal(t, t.bfloat16().float()), f"{n} is no bfloat16 number"
            # Eight bits of mantissa, over some steps of training.
            assert float((t - exact[k].model[n]).norm()) <= 0.05 * float(start[n].norm() + 1)


def test_stacks_and_messages_agree_in_bfloat16(tmp_path):
    section = {"devices": {"classes": {"half": STEADY | {"precision": "bfloat16"}}}}
    settings = tiny.config("fedavg", **EVERYONE, **section)
    jobs = tiny.run(tmp_path / "jobs", settings)
    messages = tiny.run(tmp_path / "messages", settings, grid=InProcessGrid(CLIENT_APP, 6))
    assert jobs["val"]["loss"] == pytest.approx(messages["val"]["loss"], rel=0.02)
    assert tiny.run(tmp_path / "again", settings)["weights_sha256"] == jobs["weights_sha256"]


# -- refusals and reports -----------------------------------------------------------------------------------------


def test_devices_too_small_for_the_model_are_refused_before_anything_trains():
    section = fleet()
    section["devices"]["clients"] = [{"client": 4, "memory_bytes": 1000}]
    config = tiny.config("fedavg", **section)
    check(config)  # no data, no model
    with pytest.raises(ConfigError, match=r"client 4 \(steady\) needs .* MiB, has 0.0 MiB") as caught:
        plan(config)
    assert "batch_size" in str(caught.value)


def test_half_the_bytes_fit_where_the_whole_do_not():
    need = r"needs ([\d.]+) MiB"
    section = fleet()
    section["devices"]["clients"] = [{"client": 0, "memory_bytes": 1}]
    big = {"model__width": 4096}
    with pytest.raises(ConfigError, match=need) as caught:
        plan(tiny.config("fedavg", **section, **big))
    mib = float(str(caught.value).split("needs ")[1].split(" ")[0])
    section["devices"]["clients"] = [{"client": 0, "memory_bytes": int(0.6 * mib * 2**20)}]
    with pytest.raises(ConfigError, match="client 0"):
        plan(tiny.config("fedavg", **section, **big))
    section["devices"]["clients"][0]["precision"] = "bfloat16"
    assert plan(tiny.config("fedavg", **section, **big)).fleet[0].precision == "bfloat16"


def test_the_summary_says_what_reaching_a_target_took(tmp_path):
    settings = tiny.config("fedavg", train__rounds=4, train__lr=0.2, **fleet(targets=[0.3, 0.4, 1.0]))
    summary = tiny.run(tmp_path, settings)
    seconds, rows = metric(tmp_path, "simulated_seconds"), tiny.rows(tmp_path)
    accuracy = {r["round"]: r["value"] for r in rows if (r["split"], r["metric"]) == ("val", "accuracy")}
    spent = {
        t: sum(r["value"] for r in rows if r["metric"].startswith("simulated_bytes") and r["round"] <= t)
        for t in seconds
    }
    for target, found in summary["time_to_accuracy"].items():
        first = next((t for t in sorted(accuracy) if accuracy[t] >= float(target)), None)
        assert found == (None if first is None else {"seconds": seconds[first], "bytes": spent[first]})
    assert summary["time_to_accuracy"]["1"] is None
    assert summary["time_to_accuracy"]["0.3"] is not None


def test_the_bootstrap_waits_for_the_slowest_and_is_counted(tmp_path):
    tiny.run(tmp_path, tiny.config("cmsfed", **fleet(0)))
    seconds = metric(tmp_path, "simulated_seconds")
    assert 7 < seconds[0] < seconds[1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"classes": {"phone": {"droput": 0.1}}}, r"devices\.classes\.phone\.droput: unknown key.*dropout"),
        ({"classes": {"phone": "much"}}, r"devices\.classes\.phone: .*a mapping with flops_s"),
        ({"classes": {"phone": {"battery": {"capcity_j": 1}}}}, r"phone\.battery\..*capacity_j"),
        ({"classes": {"classes": {"widht": 0.5}}}, r"devices\.classes\.classes\.widht: unknown key.*width"),
    ],
)
def test_a_slip_inside_a_class_is_named_with_what_the_class_knows(section, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(devices=section)
