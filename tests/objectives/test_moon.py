"""MOON: local features stay near the received model's and away from the older one's; the older one is last round's."""

import easy_first
import pytest
import tiny
import torch
from torch.nn import functional as F

from clients.trainer import LocalSchedule, train
from fedmm.metrics.local import predict
from fedmm.objectives.moon import ModelContrast
from fedmm.testing.objective import check_objective


def z(model, data):
    return torch.cat(list(predict(model, data).features.values()), 1)


def test_features_are_drawn_to_the_received_model_and_pushed_from_the_older():
    near, far = {}, {}
    for mu in (0.0, 2.0):
        older, data, _ = easy_first.start(1)
        model, _, _ = easy_first.start(0)
        ends = {"older": z(older, data), "received": z(model, data)}
        sent = {f"model.{n}": t for n, t in older.state_dict().items() if n.startswith("encoder.")}
        schedule = LocalSchedule(4, 16, 0.05, 0.0, 0.0)
        train(model, ModelContrast(mu=mu), data, data.modalities, {"round": torch.tensor(2)} | sent, schedule, 0, 2, 0)
        now = z(model, data)
        near[mu] = float(F.cosine_similarity(now, ends["received"]).mean())
        far[mu] = float(F.cosine_similarity(now, ends["older"]).mean())
    assert near[2.0] - far[2.0] > near[0.0] - far[0.0] + 0.1
    assert far[2.0] < far[0.0]


def test_the_older_model_is_the_one_sent_a_round_before(tmp_path):
    config = tiny.config("moon", train__rounds=1)
    server = tiny.server(tmp_path, config)
    sent = {n: t.clone() for n, t in server.model.items()}
    server.run()
    known = server.knowledge["previous"].broadcast()
    assert set(known) == {f"model.{n}" for n in sent if n.startswith("encoder.")}
    assert all(torch.equal(t, sent[n.removeprefix("model.")]) for n, t in known.items())


@pytest.mark.parametrize("switches", [{"level": "modality"}, {"mu": 0.0}], ids=str)
def test_variants_keep_the_contract(switches):
    check_objective(ModelContrast(**switches))


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_real_loop(tmp_path, rounds):
    """Without an older model, in the first round, nothing is contrasted."""
    hashes = []
    for mu in (1.0, 1.0, 0.0):
        config = tiny.config("moon", objective__mu=mu, train__rounds=rounds, **easy_first.MIXED)
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1]
    assert (hashes[1] == hashes[2]) == (rounds == 1)
