"""Device profiles: availability by hand, the seeded generator, what the configuration refuses, costs of a model."""

from collections import Counter
from math import inf, log

import numpy as np
import pytest
from torch import nn

from fedmm.config.devices import DevicesConfig
from fedmm.config.load import config_hash, dump_config, load_config
from fedmm.config.schema import Config, ModelConfig
from fedmm.engines.costs import multiplications, training_flops, training_memory
from fedmm.engines.devices import PRESETS, Availability, DeviceProfile, build_fleet, refuse_too_small
from fedmm.errors import ConfigError
from fedmm.models import build_model
from fedmm.types import ModalitySpec

MIX = {"phone": 0.7, "gateway": 0.3}


def devices(**section):
    return DevicesConfig.model_validate(section)


# -- availability -------------------------------------------------------------------------------------------------

DUTY = Availability(((0.0, 40.0),), period_s=100.0, phase_s=10.0)
"""On in [10, 50), [110, 150), ..., and [-90, -50)."""
TRACE = Availability(((5.0, 10.0), (20.0, 30.0)))


@pytest.mark.parametrize(
    ("start", "active", "end"),
    [(0, 0, 10), (10, 0, 10), (49, 0, 49), (50, 0, 110), (20, 30, 50), (20, 31, 111), (0, 100, 230), (60, 40, 150)],
)
def test_a_duty_cycle_counts_only_the_seconds_that_the_device_is_there(start, active, end):
    assert DUTY.after(start, active) == pytest.approx(end)


def test_a_trace_ends_for_good():
    assert [TRACE.after(t, 0) for t in (0, 7, 10, 29, 30)] == [5, 7, 20, 29, inf]
    assert TRACE.after(0, 15) == 30
    assert TRACE.after(0, 16) == inf
    assert Availability().after(3, 4) == 7


def test_seconds_there_and_away():
    assert DUTY.seconds(0, 300) == pytest.approx(120)
    assert DUTY.seconds(20, 30) == pytest.approx(10)
    assert DUTY.absent(20, 60) == pytest.approx(110)
    assert DUTY.absent(20, 61) == pytest.approx(151)
    assert TRACE.seconds(0, 1000) == 15
    assert TRACE.absent(0, 15) == 20
    assert TRACE.absent(0, 16) == 31
    assert Availability().absent(0, 1) == inf


def test_unbroken_availability_runs_over_the_end_of_a_period():
    night = Availability(((0.0, 10.0), (90.0, 100.0)), period_s=100.0)
    assert night.until(95) == pytest.approx(110)
    assert night.until(20) == pytest.approx(110)
    assert DUTY.until(0) == pytest.approx(50)
    assert Availability().until(5) == inf
    assert Availability(((0.0, 50.0), (50.0, 100.0)), period_s=100.0).until(60) == inf


def test_what_is_there_and_what_is_away_make_up_all_time():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.sort(rng.uniform(0, 50, 4))
        there = Availability(((edges[0], edges[1]), (edges[2], edges[3])), 50.0, float(rng.uniform(-50, 50)))
        start, length = rng.uniform(0, 500), rng.uniform(0, 200)
        end = there.after(start, length)
        assert there.seconds(start, end) == pytest.approx(length)
        back = there.absent(start, length)
        assert back - start - there.seconds(start, back) == pytest.approx(length)


# -- the generator ------------------------------------------------------------------------------------------------


def test_shares_are_met_by_largest_remainder():
    assert Counter(p.device for p in build_fleet(devices(classes=MIX), 20, 0)) == {"phone": 14, "gateway": 6}
    thirds = devices(classes={"phone": {}, "tablet": {}, "gateway": {}})
    assert sorted(Counter(p.device for p in build_fleet(thirds, 11, 0)).values()) == [3, 4, 4]


def test_counts_are_met():
    fleet = build_fleet(devices(classes={"phone": 3, "gateway": 2}), 5, 1)
    assert Counter(p.device for p in fleet) == {"phone": 3, "gateway": 2}
    with pytest.raises(ConfigError, match="count 5 clients, but there are 6"):
        build_fleet(devices(classes={"phone": 3, "gateway": 2}), 6, 1)


def test_the_fleet_is_a_function_of_the_seed():
    config = devices(classes=MIX, spread=0.5)
    assert build_fleet(config, 30, 4) == build_fleet(config, 30, 4)
    assert build_fleet(config, 30, 4) != build_fleet(config, 30, 5)
    order = [[p.device for p in build_fleet(config, 30, seed)] for seed in range(5)]
    assert len({tuple(names) for names in order}) == 5, "classes are dealt at random"


def test_the_spread_is_log_normal_around_the_class():
    fleet = build_fleet(devices(classes={"phone": {}}, spread=0.3), 2000, 0)
    for name in ("flops_s", "up_bytes_s", "down_bytes_s"):
        z = [log(getattr(p, name) / getattr(PRESETS["phone"], name)) for p in fleet]
        assert np.mean(z) == pytest.approx(0, abs=0.03)
        assert np.std(z) == pytest.approx(0.3, abs=0.02)
    assert {p.memory_bytes for p in fleet} == {PRESETS["phone"].memory_bytes}
    one = build_fleet(devices(classes={"phone": {"share": 1.0, "spread": 0.0}}, spread=0.3), 3, 0)
    assert set(one) == {PRESETS["phone"]}


def test_one_clients_figures_do_not_hang_on_how_many_there_are():
    config = devices(classes={"phone": {}}, spread=0.3)
    assert build_fleet(config, 5, 0) == build_fleet(config, 50, 0)[:5]


def test_a_class_changes_its_preset_and_a_client_its_class():
    config = devices(
        classes={"slow": {"like": "phone", "flops_s": 1e9, "local_epochs": 1, "precision": "bfloat16", "width": 0.5}},
        clients=[{"client": 1, "batch_size": 4}, {"client": 2, "device": "gateway", "memory_bytes": 7}],
        spread=0.4,
    )
    fleet = build_fleet(config, 3, 0)
    assert [p.device for p in fleet] == ["slow", "slow", "gateway"]
    assert [(p.local_epochs, p.batch_size, p.precision, p.width) for p in fleet] == [
        (1, None, "bfloat16", 0.5),
        (1, 4, "bfloat16", 0.5),
        (None, None, "float32", 1.0),
    ]
    assert fleet[2].up_bytes_s == PRESETS["gateway"].up_bytes_s, "a named device is exactly what it is called"
    assert fleet[2].memory_bytes == 7
    assert fleet[0].dropout == PRESETS["phone"].dropout


def test_a_duty_cycle_without_a_phase_is_spread_over_the_day():
    config = devices(classes={"phone": {"availability": {"kind": "duty", "share": 0.25, "period_s": 80.0}}})
    fleet = build_fleet(config, 400, 0)
    assert all(p.availability.windows_s == ((0.0, 20.0),) for p in fleet)
    there = [np.mean([p.availability.after(t, 0) == t for p in fleet]) for t in (0, 30, 60)]
    assert there == pytest.approx([0.25] * 3, abs=0.07)


def test_battery_shares_become_joules():
    battery = {"capacity_j": 100.0, "reserve": 0.2, "initial": 0.5}
    (profile,) = build_fleet(devices(classes={"phone": {"battery": battery}}), 1, 0)
    assert (profile.battery.capacity_j, profile.battery.reserve_j, profile.battery.initial_j) == (100, 20, 50)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"classes": {"phnoe": {}}}, r"classes.phnoe: lacks flops_s, memory_bytes, up_bytes_s, down_bytes_s"),
        ({"classes": {"mine": {"like": "phnoe"}}}, 'did you mean "phone"'),
        ({"classes": {"phone": {}}, "clients": [{"client": 0, "device": "x"}]}, 'unknown device "x"'),
        ({"classes": {"phone": {}}, "clients": [{"client": 9}]}, "there is no client 9"),
        ({}, "4 clients have no device"),
    ],
)
def test_a_fleet_that_cannot_be_built_says_why(section, message):
    with pytest.raises(ConfigError, match=message):
        build_fleet(devices(**section), 4, 0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{classes: {phone: 0.7, gateway: 0.2}}", "sum to 0.9"),
        ("{classes: {phone: 0.7, gateway: 3}}", "every class a share, or every class a count"),
        ("{classes: {phone: {share: 1.0, dropout: 1.0}}}", "less than 1"),
        ("{classes: {phone: {width: 0}}}", "greater than 0"),
        ("{classes: {phone: {precision: int8}}}", "float32"),
        ("{classes: {phone: {availability: {kind: trace}}}}", "windows_s must be pairs"),
        ("{classes: {phone: {availability: {kind: trace, windows_s: [[5.0, 3.0]]}}}}", "windows_s must be pairs"),
        ("{classes: {phone: {availability: {windows_s: [[1.0, 3.0]]}}}}", "belong to kind: trace"),
        ("{clients: [{client: 1}, {client: 1}]}", "stands twice"),
        ("{over_selection: 0.5}", "greater than or equal to 1"),
        ("{deadlin_s: 3}", "deadline_s"),
    ],
)
def test_a_section_that_means_nothing_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [f"devices={section}"])


def test_the_section_is_optional_and_survives_a_round_trip(tmp_path):
    assert load_config(None).config.devices is None
    text = (
        "devices:\n  classes: {phone: {share: 0.7, availability: always}, gateway: 0.3}\n  spread: 0.3\n"
        "  mode: buffered\n  buffer: {size: 3, concurrency: 4}\n  clients: [{client: 0, device: tablet}]\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml", ["devices.deadline_s=60"]).config
    assert config.devices.deadline_s == 60
    assert config.devices.classes["gateway"].share == 0.3
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert config_hash(load_config(tmp_path / "again.yaml").config) == config_hash(config)
    assert load_config(None, ["devices=phone"]).config.devices.classes.keys() == {"phone"}


def test_devices_too_small_are_named_with_need_have_and_remedy():
    fleet = [DeviceProfile("phone", 1e9, size * 2**20, 1, 1) for size in (8, 2, 3)]
    refuse_too_small(fleet, dict.fromkeys(range(3), 2 * 2**20))
    with pytest.raises(ConfigError) as refusal:
        refuse_too_small(fleet, {0: 9 * 2**19, 1: 9 * 2**19, 2: 9 * 2**19})
    text = str(refusal.value)
    assert "2 of 3 devices" in text
    assert "client 1 (phone) needs 4.5 MiB, has 2.0 MiB; client 2 (phone) needs 4.5 MiB, has 3.0 MiB" in text
    assert "client 0" not in text
    assert "batch_size" in text


# -- what a model costs -------------------------------------------------------------------------------------------

SPECS = {"audio": ModalitySpec("vector", (10,)), "image": ModalitySpec("image", (3, 8, 8))}
MODEL = ModelConfig.model_validate({"features": 6, "width": 4, "norm": "none"})


def test_operations_of_linear_and_convolutional_layers_by_hand():
    model = build_model(SPECS, 5, MODEL, 0)
    audio = 2 * (10 * 4 + 4 * 6)
    image = 2 * (4 * 4 * 4 * (3 * 25) + 2 * 2 * 8 * (4 * 9) + 32 * 6)
    head = 2 * 12 * 5
    assert training_flops(model, SPECS, ("audio", "image")) == 3 * (audio + image + head)
    assert training_flops(model, SPECS, ("audio",)) == 3 * (audio + head)
    assert multiplications(model, SPECS, ("audio", "image")) == (audio + image + head) / 2
    assert multiplications(model, SPECS, ("audio",)) == (audio + head) / 2


def test_memory_of_a_small_network_by_hand():
    model = build_model(SPECS, 5, MODEL, 0)
    need = training_memory(model, SPECS, ("audio",), 8)
    parameters = (10 * 4 + 4) + (4 * 6 + 6) + (12 * 5 + 5)
    assert (need.parameters, need.gradients, need.momentum) == (4 * parameters,) * 3
    # Kept for the backward pass at least: the input, the hidden layer and what goes into the head.
    assert 8 * 4 * (10 + 4 + 12) <= need.activations <= 3 * 8 * 4 * (10 + 4 + 12)
    assert need.total == need.parameters + need.gradients + need.momentum + need.activations


def test_memory_scales_with_batch_and_precision_and_without_momentum():
    model = build_model(SPECS, 5, MODEL, 0)
    one, ten = (training_memory(model, SPECS, tuple(SPECS), n) for n in (1, 10))
    assert ten.activations == 10 * one.activations
    assert ten.parameters == one.parameters
    half = training_memory(model, SPECS, tuple(SPECS), 10, "bfloat16", momentum=False)
    assert (half.parameters, half.gradients, half.momentum) == (ten.parameters // 2, ten.gradients // 2, 0)
    assert ten.activations / 2 <= half.activations < 0.6 * ten.activations, "masks stay one byte each"


def test_measuring_leaves_the_model_as_it_was():
    model = build_model(SPECS, 5, MODEL.model_copy(update={"norm": "batch"}), 0).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    training_flops(model, SPECS, ("image",))
    training_memory(model, SPECS, ("image",), 4)
    multiplications(model, SPECS, ("image",))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all((t == before[n]).all() for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_devices_never_reach_the_clients_part_of_the_configuration():
    from fedmm.spec import client_spec

    assert client_spec(Config()) == client_spec(Config(devices=devices(classes=MIX)))
