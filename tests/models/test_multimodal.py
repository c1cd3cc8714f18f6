"""The network: shapes, blocks, absence, starting values."""

import pytest
import tiny
import torch

from fedmm.config.schema import ModelConfig, ProjectorConfig
from fedmm.errors import ConfigError
from fedmm.models import block_of, blocks_of, build_model, bytes_per_block, modality_of, serves
from fedmm.types import ModalitySpec

SPECS = {
    "image": ModalitySpec("image", (3, 9, 9)),
    "sound": ModalitySpec("spectrogram", (1, 9, 7)),
    "words": ModalitySpec("text", (12,)),
    "sensor": ModalitySpec("vector", (4,)),
}
FUSIONS = ["concat", "sum", "gated", "film", "late"]


def inputs(specs, samples=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = {m: torch.randn(samples, *s.shape, generator=generator) for m, s in specs.items()}
    return x, {m: torch.ones(samples, dtype=torch.bool) for m in specs}


@pytest.mark.parametrize("projector", [None, ProjectorConfig(depth=2)])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shapes_for_any_number_of_modalities(count, fusion, projector):
    specs = dict(list(SPECS.items())[:count])
    config = ModelConfig(features=8, width=4, fusion=fusion, projector=projector, unimodal_heads=True)
    model = build_model(specs, 3, config, 0)
    out = model(*inputs(specs))
    assert out.logits.shape == (5, 3)
    assert {m: h.shape for m, h in out.features.items()} == dict.fromkeys(specs, (5, 8))
    assert {m: o.shape for m, o in out.modality_logits.items()} == dict.fromkeys(specs, (5, 3))
    assert set(out.infiltration_logits) == (set(specs) if projector else set())


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_resnet_has_the_papers_stem_and_width(norm):
    specs = {"image": ModalitySpec("image", (3, 33, 33)), "sound": ModalitySpec("spectrogram", (1, 40, 47))}
    model = build_model(specs, 6, ModelConfig(encoder="resnet18", features=512, norm=norm), 0)
    x, present = inputs(specs, 2)
    assert model.encode(x, present)["sound"].shape == (2, 512)
    assert model.head["joint"].weight.shape == (6, 1024)
    assert model.encoder["sound"][0].weight.shape == (64, 1, 7, 7)
    if norm == "none":
        # Convolutions of ResNet-18 with a one-channel stem, as in every textbook.
        assert sum(p.numel() for p in model.encoder["sound"].parameters()) == 11_160_640


def test_papers_projector_sizes():
    specs = {m: ModalitySpec("vector", (4,)) for m in ("a", "b")}
    model = build_model(specs, 6, ModelConfig(features=512, projector=ProjectorConfig(), unimodal_heads=True), 0)
    size = {
        b: sum(p.numel() for n, p in model.named_parameters() if block_of(n) == b)
        for b in blocks_of(model.state_dict())
    }
    assert size["projector.a.self"] == size["projector.b.infiltration"] == 3 * (512 * 512 + 512)
    assert size["head.a"] == 6 * 513
    assert set(size) == {
        "encoder.a", "encoder.b", "projector.a.self", "projector.a.infiltration", "projector.b.self",
        "projector.b.infiltration", "head.joint", "head.a", "head.b",
    }  # fmt: skip


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_entry_and_nothing_present_are_the_same(fusion, depth):
    modalities = tiny.names(3)
    model = tiny.model(modalities, depth=depth, fusion=fusion)
    data = tiny.data(modalities, 6)
    for m in modalities:
        alone = model({m: data.x[m]}, {m: data.present[m]})
        absent = {n: data.present[n] & (n == m) for n in modalities}
        full = model(data.x, absent)
        assert torch.allclose(alone.logits, full.logits, atol=1e-12)
        assert torch.allclose(alone.features[m], full.features[m], atol=1e-12)
        assert not full.features[next(n for n in modalities if n != m)].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_do_not_touch_each_other(fusion):
    modalities = tiny.names(2)
    model, data = tiny.model(modalities, fusion=fusion), tiny.data(modalities, 8, 0, 0.5)
    together = model(data.x, data.present).logits
    for i in range(8):
        row = data.batch(torch.tensor([i]))
        assert torch.allclose(model(row.x, row.present).logits[0], together[i], atol=1e-12)


def test_late_fusion_is_the_mean_of_the_present_heads():
    modalities = tiny.names(3)
    model, data = tiny.model(modalities, depth=None, fusion="late"), tiny.data(modalities, 8, 0, 0.4)
    assert set(blocks_of(model.state_dict())) == {f"{part}.{m}" for part in ("encoder", "head") for m in modalities}
    out = model(data.x, data.present)
    for i in range(8):
        here = [out.modality_logits[m][i] for m in modalities if data.present[m][i]]
        assert torch.allclose(out.logits[i], torch.stack(here).mean(0), atol=1e-12)


def test_a_missing_half_of_the_concatenation_is_zero_or_the_stand_in():
    modalities = tiny.names(2)
    for fill in ("zero", "infiltration"):
        model = tiny.model(modalities, depth=1, fill=fill)
        data = tiny.data(modalities, 4)
        h = model.encoder["m1"](data.x["m1"])
        z_S = model.projector["m1"]["self"](h)
        z_I = model.projector["m1"]["infiltration"](h) if fill == "infiltration" else torch.zeros_like(h)
        expected = model.head["joint"](torch.cat([z_S, z_I], 1))
        assert torch.allclose(model({"m1": data.x["m1"]}, {"m1": data.present["m1"]}).logits, expected, atol=1e-12)


def test_equal_blocks_start_equal_in_any_model():
    specs = {m: ModalitySpec("vector", (5,)) for m in ("a", "b")}
    plain = build_model(specs, 3, ModelConfig(features=8), 4).state_dict()
    rich = build_model(
        specs, 3, ModelConfig(features=8, projector=ProjectorConfig(), unimodal_heads=True), 4
    ).state_dict()
    single = build_model({"b": specs["b"]}, 3, ModelConfig(features=8), 4).state_dict()
    other = build_model(specs, 3, ModelConfig(features=8), 5).state_dict()
    assert all(torch.equal(rich[n], t) for n, t in plain.items())
    assert all(torch.equal(plain[n], t) for n, t in single.items() if n.startswith("encoder"))
    assert not torch.equal(plain["encoder.a.1.weight"], other["encoder.a.1.weight"])
    assert all(not t.any() for n, t in plain.items() if n.endswith("bias"))


def test_building_a_model_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build_model(SPECS, 3, ModelConfig(features=8), 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "block", "modality"),
    [
        ("encoder.audio.net.0.weight", "encoder.audio", "audio"),
        ("projector.audio.self.0.bias", "projector.audio.self", "audio"),
        ("projector.audio.infiltration.2.bias", "projector.audio.infiltration", "audio"),
        ("fusion.linear.audio.weight", "fusion", None),
        ("head.joint.weight", "head.joint", None),
        ("head.audio.weight", "head.audio", "audio"),
    ],
)
def test_blocks(name, block, modality):
    assert block_of(name) == block
    assert modality_of(block) == modality
    assert serves(name, ["audio"])
    assert serves(name, ["video"]) == (modality is None)


@pytest.mark.parametrize("name", ["classifier.weight", "encoder.audio", "weight", "head", ""])
def test_names_outside_the_contract_are_refused(name):
    with pytest.raises(ConfigError, match="belongs to no block"):
        block_of(name)


def test_bytes_are_counted_by_block():
    tensors = {
        "encoder.a.w": torch.zeros(3, 2),
        "encoder.a.n": torch.tensor(1),
        "head.joint.w": torch.zeros(5).double(),
    }
    assert bytes_per_block(tensors) == {"encoder.a": 32, "head.joint": 40}


@pytest.mark.parametrize(
    ("specs", "config", "match"),
    [
        ({"a.b": SPECS["sensor"]}, ModelConfig(), "cannot name a modality"),
        ({"joint": SPECS["sensor"]}, ModelConfig(), "cannot name a modality"),
        ({"a": SPECS["sensor"]}, ModelConfig(encoder="cmm"), "cnn"),
        ({"a": SPECS["sensor"]}, ModelConfig(encoder="cnn"), "mlp or text"),
        ({"a": SPECS["sensor"]}, ModelConfig(encoder={"b": "mlp"}), "no such modality"),
    ],
)
def test_mistakes_are_explained(specs, config, match):
    with pytest.raises(ConfigError, match=match):
        build_model(specs, 3, config, 0)
