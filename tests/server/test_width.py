"""Devices that train a part of the model's width (HeteroFL): every entry is the mean over those who hold it."""

import pytest
import tiny
import torch

from experiments.runner import CLIENT_APP
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import ConfigError
from fedmm.io.checkpoint import load_checkpoint
from fedmm.models import build_model, bytes_per_block
from fedmm.models.width import build_narrow, corner, padded, shapes_of
from fedmm.types import ModalitySpec
from server.aggregation import Update, blockwise_mean
from server.plan import check, plan

STEADY = {"flops_s": 1e9, "memory_bytes": 2**30, "up_bytes_s": 1e6, "down_bytes_s": 1e6}
HALVES = {"classes": {"full": STEADY | {"count": 3}, "half": STEADY | {"count": 3, "width": 0.5}}}
IMAGES = {"image": ModalitySpec("image", (1, 8, 8)), "speech": ModalitySpec("spectrogram", (1, 8, 8))}


def settings(devices=HALVES, **changes):
    return tiny.config(**{"train__clients_per_round": 6, "train__rounds": 3, "devices": devices} | changes)


def test_a_narrow_model_is_the_whole_one_without_its_other_hidden_units():
    made = plan(settings(model__norm="none"))
    narrow = made.narrow_model(8)
    weights = corner(made.model.state_dict(), shapes_of(narrow))
    narrow.load_state_dict(weights)
    made.model.load_state_dict({n: padded(t, made.model.state_dict()[n].shape) for n, t in weights.items()})
    x = {m: torch.randn(5, *spec.shape) for m, spec in made.dataset.specs.items()}
    here = {m: torch.ones(5, dtype=torch.bool) for m in x}
    assert torch.allclose(narrow(x, here).logits, made.model(x, here).logits, atol=1e-6)


@pytest.mark.parametrize("encoder", ["cnn", "convnet", "resnet18", "mlp"])
def test_parts_of_every_encoder_are_leading_corners(encoder):
    config = settings(model__width=8, model__encoder=encoder).model
    whole = build_model(IMAGES, 4, config, 0)
    narrow = build_narrow(IMAGES, 4, config, 3, 0, whole)
    weights = corner(whole.state_dict(), shapes_of(narrow))
    narrow.load_state_dict(weights)
    x = {m: torch.randn(2, *spec.shape) for m, spec in IMAGES.items()}
    assert narrow(x, {m: torch.ones(2, dtype=torch.bool) for m in x}).logits.shape == (2, 4)
    smaller = [n for n, t in whole.state_dict().items() if t.shape != weights[n].shape]
    assert {n.split(".")[0] for n in smaller} == {"encoder"}


def test_each_entry_is_the_mean_over_those_who_hold_it():
    name = "encoder.a.weight"
    previous = {name: torch.full((3, 2), -1.0)}
    part = Update(0, 10, ("a",), {name: torch.full((1, 2), 2.0)}, {}, 0.0, True, held={name: torch.Size([1, 2])})
    more = Update(1, 30, ("a",), {name: torch.full((2, 2), 6.0)}, {}, 0.0, True, held={name: torch.Size([2, 2])})
    found = blockwise_mean(previous, [part, more])[name]
    assert found.tolist() == [[5.0, 5.0], [6.0, 6.0], [-1.0, -1.0]]


def test_a_round_of_halves_and_wholes_by_hand(tmp_path):
    config = settings(train__rounds=1)
    summary = tiny.run(tmp_path / "jobs", config)
    server = tiny.server(tmp_path / "hand", config, InProcessGrid(CLIENT_APP, 6))  # messages: models come singly
    server._connect()
    updates = server._collect(server._select(1), 1, 1)
    total = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in server.model.items()}
    mass = {n: torch.zeros_like(t) for n, t in total.items()}
    halves = {k for k, device in enumerate(server.plan.fleet) if device.width == 0.5}
    for u in updates:
        assert (u.model["encoder.m1.1.weight"].shape[0] == 8) == (u.client in halves)
        for n, t in u.model.items():
            total[n] += u.samples * padded(t.double(), total[n].shape)
            mass[n] += u.samples * padded(torch.ones_like(t, dtype=torch.float64), total[n].shape)
    assert len(halves) == 3
    saved = load_checkpoint(tmp_path / "jobs" / "checkpoints").tensors
    tiny.assert_close(
        {n.removeprefix("model/"): t for n, t in saved.items() if n.startswith("model/")},
        {n: t / mass[n] for n, t in total.items()},
    )
    whole, narrow = server.plan.model, server.plan.narrow_model(8)
    sizes = [sum(bytes_per_block(m.state_dict()).values()) for m in (whole, narrow)]
    assert summary["simulated_bytes_down"] == summary["simulated_bytes_up"] == 3 * sum(sizes)
    up = sum(
        r["value"] for r in tiny.rows(tmp_path / "jobs") if r["metric"] == "bytes_up" and r["modality"] != "report"
    )
    assert up == 3 * sum(sizes)


def test_what_nobody_holds_stays(tmp_path):
    tiny.run(tmp_path, settings({"classes": {"half": STEADY | {"width": 0.5}}}))
    before = plan(settings()).model.state_dict()["encoder.m1.1.weight"]
    after = load_checkpoint(tmp_path / "checkpoints").tensors["model/encoder.m1.1.weight"]
    assert torch.equal(after[8:], before[8:])
    assert not torch.equal(after[:8], before[:8])


@pytest.mark.parametrize(
    ("method", "mode"), [("fedavg", "synchronous"), ("fedavg", "buffered"), ("fedcmi", "buffered")]
)
def test_messages_and_jobs_give_the_same_bits_and_so_does_an_interrupted_run(tmp_path, method, mode):
    devices = HALVES | {"mode": mode, "buffer": {"size": 3, "concurrency": 4}, "spread": 0.5}
    config = settings(devices, method=method)
    jobs = tiny.run(tmp_path / "jobs", config)
    messages = tiny.run(tmp_path / "messages", config, grid=InProcessGrid(CLIENT_APP, 6))
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "parts", config, callbacks=[tiny.StopAfter(2)])
    parts = tiny.run(tmp_path / "parts", config, resume=True)
    assert jobs["weights_sha256"] == messages["weights_sha256"] == parts["weights_sha256"]
    assert (jobs["bytes_up"], jobs["bytes_down"]) == (messages["bytes_up"], messages["bytes_down"])
    assert jobs["simulated_seconds"] == parts["simulated_seconds"]


def test_a_part_fits_where_the_whole_does_not():
    devices = {"classes": {"small": STEADY | {"memory_bytes": 200_000}}}
    with pytest.raises(ConfigError, match="too small"):
        plan(settings(devices, model__width=1024))
    devices["classes"]["small"]["width"] = 0.1
    assert set(plan(settings(devices, model__width=1024)).narrow) == {103}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model__width": None}, r"model\.width"),
        ({"method": "cmsfed"}, "changes of whole models"),
        ({"method": "fedavg", "selection__name": "divfl"}, "changes of whole models"),
    ],
)
def test_refusals(changes, match):
    with pytest.raises(ConfigError, match=match):
        check(settings(**changes))


def test_a_network_with_other_layers_at_another_width_is_no_part():
    config = settings(model__encoder="resnet18", model__width=8, model__features=64).model
    with pytest.raises(ConfigError, match="other layers"):
        build_narrow(IMAGES, 4, config, 4, 0, build_model(IMAGES, 4, config, 0))


@pytest.mark.slow
def test_ray_gives_the_bits_of_this_process(tmp_path):
    from experiments.runner import run

    devices = {"classes": {"full": STEADY | {"count": 3}, "half": STEADY | {"count": 3, "width": 0.5}}}
    devices["clients"] = [{"client": 1, "precision": "bfloat16"}, {"client": 2, "local_epochs": 2, "batch_size": 8}]
    config = settings(devices, engine__cohort="on")
    here = run(config, tmp_path / "here")
    ray = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "ray", "workers": 2})})
    assert run(ray, tmp_path / "ray")["weights_sha256"] == here["weights_sha256"]
