"""G-Blend: a branch that only learns its samples by heart loses its weight; held-out samples are never trained on."""

import easy_first
import pytest
import tiny
import torch

from fedmm.objectives.gblend import GradientBlending, held_out
from fedmm.testing.objective import check_objective


def test_the_branch_that_overfits_loses_weight(tmp_path):
    """The second modality says nothing, in 200 dimensions: nothing to learn, much to memorise."""
    settings = easy_first.DATA | {"data__params__noise": [0.0, 1.0], "data__params__dims": [8, 200]}
    config = tiny.config("gblend", train__rounds=1, train__local_epochs=10, objective__held_out=0.3, **settings)
    server = tiny.server(tmp_path, config)
    server.run()
    weights = {n: float(t) for n, t in server.knowledge["blend"].broadcast().items()}
    assert weights["blend.m2"] < 0.05 * weights["blend.m1"]
    logged = [r["value"] for r in tiny.rows(tmp_path) if r["metric"] == "blend_weight" and r["modality"] == "m2"]
    assert logged[-1] == pytest.approx(weights["blend.m2"])


def test_held_out_samples_do_not_move_the_model():
    ends = []
    for spoil in (0.0, 5.0):
        model, data, _ = easy_first.start()
        rows = held_out(data, 0.2, 0)
        data.x["m1"][rows] += spoil
        state = GradientBlending(held_out=0.2).begin(model, data, {"round": torch.tensor(0)})
        (loss,) = GradientBlending(held_out=0.2).losses(model, data.batch(), state)
        ends.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        data.x["m1"][rows] -= spoil
    assert torch.equal(*ends)


@pytest.mark.parametrize("switches", [{"adapt": False}, {"held_out": 0.0}], ids=str)
def test_variants_keep_the_contract(switches):
    check_objective(GradientBlending(**switches))


def test_the_real_loop(tmp_path):
    hashes = []
    for adapt in (True, True, False):
        config = tiny.config("gblend", objective__adapt=adapt, **easy_first.MIXED)
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
