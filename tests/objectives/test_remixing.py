"""Data Remixing on data whose second modality is learnable but hard: it keeps more samples, and learns more."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from clients.trainer import LocalSchedule, train
from fedmm import seeding
from fedmm.config.schema import ModelConfig
from fedmm.data import build_federation, load_dataset
from fedmm.metrics.local import predict
from fedmm.models import block_of, blocks_of, build_model
from fedmm.objectives.joint import Auxiliary
from fedmm.objectives.remixing import Remixing
from fedmm.testing.objective import check_objective
from fedmm.types import ClientData, ModalitySpec
from server.aggregation import Update
from server.strategies.subset import SubsetWeighted

HARD_SECOND = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__samples": 560,
    "data__params__spread": [0.05, 0.49],
    "data__params__dims": [8, 30],
    "scenario__clients": 1,
    "train__clients_per_round": 1,
}


def start(config):
    dataset = load_dataset(config.data)
    federation = build_federation(dataset, config.scenario, config.seed)
    model = build_model(dataset.specs, len(dataset.classes), config.model, config.seed)
    return model, federation.client(0, "train"), federation.client(0, "test")


def trained(objective, seed, rounds=6):
    """The model after some rounds of two epochs, how often m2 was kept, and both modalities' accuracy alone."""
    model, data, test = start(tiny.config("remix", seed=seed, **HARD_SECOND))
    schedule, shares = LocalSchedule(2, 16, 0.05, 0.0, 0.0), []
    for round in range(rounds):
        broadcast = {"round": torch.tensor(round)}
        state = objective.begin(model, data, broadcast)
        shares.append(float(state["sample.kept.m2"].double().mean()) if "remix" in state else 1.0)
        train(model, objective, data, data.modalities, broadcast, schedule, 0, round, 0)
    out = predict(model, test)
    alone = {
        m: float((model.decide({m: h}, {m: test.present[m]}).logits.argmax(1) == test.y).double().mean())
        for m, h in out.features.items()
    }
    return shares, alone


def test_the_harder_modality_keeps_the_larger_share_and_learns_more():
    gains = []
    for seed in range(2):
        shares, remixed = trained(Remixing(warmup_rounds=2), seed)
        assert shares[:2] == [1.0, 1.0]
        assert shares[2] > 0.6
        assert remixed["m1"] > 0.9
        gains.append(remixed["m2"] - trained(Auxiliary(weight=0.5), seed)[1]["m2"])
    assert sum(gains) / 2 > 0.04


def test_each_epoch_assigns_anew_if_told_to():
    config = tiny.config("remix", **HARD_SECOND)
    ends = {}
    for reassign in ("round", "epoch"):
        for warmup, epochs in ((0, 1), (0, 3), (9, 3)):
            model, data, _ = start(config)
            objective = Remixing(warmup_rounds=warmup, reassign=reassign)
            schedule = LocalSchedule(epochs, 16, 0.05, 0.0, 0.0)
            train(model, objective, data, data.modalities, {"round": torch.tensor(1)}, schedule, 0, 1, 0)
            ends[reassign, warmup, epochs] = model.head["joint"].weight.detach()
    assert torch.equal(ends["round", 0, 1], ends["epoch", 0, 1])
    assert not torch.equal(ends["round", 0, 3], ends["epoch", 0, 3])
    assert torch.equal(ends["round", 9, 3], ends["epoch", 9, 3])


def test_clients_weigh_by_the_samples_that_keep_a_modality(tmp_path):
    """The strategy's mean by hand, and a run that it changes."""
    model = {n: torch.zeros(2) for n in ("encoder.a.w", "encoder.b.w", "head.joint.w")}

    def update(k, samples, report, blocks):
        trained = {n: torch.full((2,), k + 1.0) for n in model if block_of(n) in blocks}
        counts = {f"subset.{m}": torch.tensor(float(c), dtype=torch.float64) for m, c in report.items()}
        return Update(k, samples, ("a", "b"), trained, counts, 0.0, True)

    everything = ("encoder.a", "encoder.b", "head.joint")
    updates = [
        update(0, 10, {"a": 9, "b": 1}, everything),
        update(1, 30, {"a": 3, "b": 27}, everything),
        update(2, 20, {"a": 20, "b": 0}, ("encoder.a", "head.joint")),
    ]
    found, _ = SubsetWeighted().aggregate(model, updates, {}, 1)
    assert float(found["encoder.a.w"][0]) == pytest.approx((9 * 1 + 3 * 2 + 20 * 3) / 32)
    assert float(found["encoder.b.w"][0]) == pytest.approx((1 * 1 + 27 * 2) / 28)
    assert float(found["head.joint.w"][0]) == pytest.approx((10 * 1 + 30 * 2 + 20 * 3) / 60)

    hashes = set()
    for strategy in ("fedavg", "subset"):
        config = tiny.config(
            "remix", objective__warmup_rounds=0, objective__report_subsets=True, strategy__name=strategy
        )
        hashes.add(tiny.run(tmp_path / strategy, config)["weights_sha256"])
    assert len(hashes) == 2


IMAGES = {m: ModalitySpec("image", (1, 8, 8)) for m in ("a", "b")}


@pytest.mark.parametrize("mask", ["skip", "feature"])
def test_statistics_of_skipped_encoders_stay(mask):
    model = build_model(IMAGES, 3, ModelConfig(encoder="cnn", features=4, norm="batch", unimodal_heads=True), 0)
    generator = seeding.torch_rng(0, "images")
    x = {m: torch.randn(12, 1, 8, 8, generator=generator) for m in IMAGES}
    data = ClientData(x, dict.fromkeys(IMAGES, torch.ones(12).bool()), torch.arange(12) % 3, 3)
    objective = Remixing(warmup_rounds=0, mask=mask)
    state = objective.begin(model, data, {"round": torch.tensor(0)})
    half = torch.arange(12) < 6
    state |= {"sample.kept.a": half, "sample.kept.b": ~half}
    for batch in objective.batches(data, state, 6, generator):
        kept = "a" if bool(half[batch.index[0]]) else "b"
        before = {n: t.clone() for n, t in model.named_buffers()}
        objective.losses(model, batch, state)
        moved = {n.split(".")[1] for n, t in model.named_buffers() if not torch.equal(t, before[n])}
        assert moved == ({kept} if mask == "skip" else {"a", "b"})


@pytest.mark.parametrize("mask", ["skip", "feature", "input"])
def test_a_client_has_no_say_in_blocks_whose_subset_is_empty(mask, tmp_path):
    config = tiny.config(
        "remix", objective__warmup_rounds=0, objective__mask=mask, train__rounds=1, train__momentum=0.9
    )
    server = tiny.server(tmp_path, config)
    for part in ("weight", "bias"):
        server.model[f"head.m1.{part}"].zero_()  # a flat prediction: every sample keeps m1
    before = {n: t.clone() for n, t in server.model.items()}
    server.run()
    moved = {block_of(n) for n, t in server.model.items() if not torch.equal(t, before[n])}
    assert moved == {"encoder.m1", "head.m1", "head.joint"}
    assert not [e for e in tiny.manifest(tmp_path)["events"] if e["kind"] == "blocks"]


def test_optional_blocks_are_those_of_a_modality():
    blocks = blocks_of(tiny.model(tiny.names(2), depth=None).state_dict())
    assert set(Remixing().optional_blocks(blocks, ("m1", "m2"))) == set(blocks) - {"head.joint"}
    assert set(Remixing().optional_blocks(blocks, ("m2",))) == {"encoder.m2", "head.m2"}


@pytest.mark.parametrize("mask", ["feature", "input"])
def test_variants_keep_the_contract(mask):
    check_objective(Remixing(mask=mask, warmup_rounds=0, reassign="epoch", report_subsets=True))


def test_one_client_is_a_plain_training_loop(tmp_path):
    """Algorithm 1 with `torch.optim.SGD`, blocked, on the same permutations: warm-up round, then two remixed rounds."""
    config = tiny.config(
        "remix",
        objective__warmup_rounds=1,
        objective__order="blocked",
        scenario__clients=1,
        train__clients_per_round=1,
        train__rounds=3,
        train__momentum=0.0,
        train__weight_decay=0.0,
    )
    server = tiny.server(tmp_path, config)
    server.run()
    model, data, _ = start(config)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    W, both = model.head["joint"], data.modalities

    def step(loss):
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    for round in (1, 2, 3):
        stream = seeding.torch_rng(config.seed, "batches", round, 0)
        if round == 1:
            for rows in torch.randperm(len(data), generator=stream).split(16):
                h = {m: model.encoder[m](data.x[m][rows]) for m in both}
                loss = F.cross_entropy(W(torch.cat(list(h.values()), 1)), data.y[rows])
                step(loss + 0.5 * sum(F.cross_entropy(model.head[m](h[m]), data.y[rows]) for m in both))
            continue
        with torch.no_grad():
            own = [F.softmax(model.head[m](model.encoder[m](data.x[m])), 1) for m in both]
        keep = torch.stack([(p * (p.shape[1] * p).log()).sum(1) for p in own]).argmin(0)
        subsets = []
        for slot in range(2):
            rows = (keep == slot).nonzero().flatten()
            subsets.append(rows[torch.randperm(len(rows), generator=stream)] if len(rows) else rows)
        for slot, m in enumerate(both):
            for rows in subsets[slot].split(16) if len(subsets[slot]) else ():
                h = model.encoder[m](data.x[m][rows])
                fused = h @ W.weight[:, 8 * slot : 8 * slot + 8].T + W.bias
                step(F.cross_entropy(fused, data.y[rows]) + F.cross_entropy(model.head[m](h), data.y[rows]))
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, server.model[name], atol=1e-5), name


def test_the_real_loop(tmp_path):
    hashes = set()
    for warmup in (1, 2):
        config = tiny.config(
            "remix",
            objective__warmup_rounds=warmup,
            data__params__modalities=3,
            scenario__modalities__multimodal=0.7,
            scenario__modalities__missing=0.1,
        )
        summary = tiny.run(tmp_path / str(warmup), config)
        assert summary["status"] == "completed"
        hashes.add(summary["weights_sha256"])
    assert len(hashes) == 2
