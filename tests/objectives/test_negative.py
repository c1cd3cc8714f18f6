"""MNL on data whose second modality is learnable but hard: the sure modality teaches what the answer is not."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from clients.trainer import LocalSchedule, train
from fedmm.data import build_federation, load_dataset
from fedmm.metrics.local import predict
from fedmm.models import build_model
from fedmm.objectives.negative import Negative, guidance
from fedmm.testing.objective import check_objective

HARD_SECOND = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__spread": [0.05, 0.49],
    "data__params__dims": [8, 30],
    "scenario__clients": 1,
    "train__clients_per_round": 1,
}


def trained(objective, epochs=6):
    config = tiny.config("mnl", **HARD_SECOND)
    dataset = load_dataset(config.data)
    data = build_federation(dataset, config.scenario, 0).client(0, "train")
    model = build_model(dataset.specs, len(dataset.classes), config.model, 0)
    schedule = LocalSchedule(epochs, 16, 0.05, 0.9, 0.0)
    train(model, objective, data, data.modalities, {"round": torch.tensor(9)}, schedule, 0, 1, 0)
    out = predict(model, data)
    return out, data, *guidance(out.modality_logits, out.logits, data.present, data.y)


def test_the_sure_modality_teaches_and_the_other_learns_what_the_answer_is_not():
    gap = {}
    for weight in (0.0, 0.7, 2.0):
        out, data, guide, guided = trained(Negative(lambda_negative=weight))
        assert int(guided["m2"].sum()) > 3 * int(guided["m1"].sum())
        # How far the student's opinion of the wrong classes is from the guide's.
        truth = F.one_hot(data.y, data.classes).bool()
        teacher = F.log_softmax(guide.log().masked_fill(truth, -1e9), 1)
        student = F.log_softmax(out.modality_logits["m2"].masked_fill(truth, -1e9), 1)
        distance = F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
        gap[weight] = float(distance[guided["m2"]].mean())
    assert gap[2.0] < gap[0.7] < gap[0.0]
    assert gap[2.0] < 0.75 * gap[0.0]


@pytest.mark.parametrize(
    "switches", [{"guide": "global", "competitor": "per_modality", "extra": True}, {"warmup_rounds": 9}], ids=str
)
def test_variants_keep_the_contract(switches):
    check_objective(Negative(**switches))


def test_the_real_loop(tmp_path):
    hashes = set()
    for weight in (0.0, 0.7):
        config = tiny.config(
            "mnl",
            objective__lambda_negative=weight,
            objective__warmup_rounds=1,
            data__params__modalities=3,
            scenario__modalities__multimodal=0.7,
            scenario__modalities__missing=0.1,
        )
        summary = tiny.run(tmp_path / str(weight), config)
        assert summary["status"] == "completed"
        hashes.add(summary["weights_sha256"])
    assert len(hashes) == 2
