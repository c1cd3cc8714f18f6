"""AGM on data whose first modality is easy: it runs ahead of its own history, and its encoder is slowed for it."""

import easy_first
import tiny
import torch

from clients.trainer import LocalSchedule, train
from fedmm.objectives.agm import AdaptiveModulation
from fedmm.objectives.joint import Joint
from fedmm.testing.objective import check_objective


def path_length(objective):
    """How far each encoder moves from where it began."""
    model, data, _ = easy_first.start()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(
        model, objective, data, data.modalities, {"round": torch.tensor(0)}, LocalSchedule(3, 16, 0.05, 0, 0), 0, 1, 0
    )
    moved = {n: float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()}
    return {m: sum(v for n, v in moved.items() if n.startswith(f"encoder.{m}.")) ** 0.5 for m in data.modalities}


def test_the_encoder_that_runs_ahead_is_slowed_and_the_other_sped_up():
    joint, modulated = path_length(Joint()), path_length(AdaptiveModulation())
    assert modulated["m1"] < 0.98 * joint["m1"]
    assert modulated["m2"] > 1.03 * joint["m2"]
    assert path_length(AdaptiveModulation(alpha=0.0)) == joint


def test_variants_keep_the_contract():
    check_objective(AdaptiveModulation(alpha=2.0, cap=0.5))


def test_the_real_loop(tmp_path):
    hashes = []
    for alpha in (1.0, 1.0, 0.0):
        config = tiny.config("agm", objective__alpha=alpha, **easy_first.MIXED)
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
