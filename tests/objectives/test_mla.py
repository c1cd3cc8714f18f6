"""MLA: turns spare what earlier ones learned, and a hard modality learns more than under joint training."""

import easy_first
import pytest
import tiny
import torch

from clients.trainer import LocalSchedule, train
from fedmm.objectives.joint import Joint
from fedmm.objectives.mla import Alternating, head_input
from fedmm.testing.objective import check_objective

SUM = {"model__fusion": "sum"}


def test_the_second_turn_leaves_the_first_modalitys_logits_alone():
    """What one step on m2 does to the head's answer to m1's mean feature, with and without projection."""
    modalities = tiny.names(2)
    data = tiny.data(modalities, 8)
    moved = {}
    for project in (True, False):
        model, objective = tiny.model(modalities, 0, None, fusion="sum"), Alternating(project=project)
        state = objective.begin(model, data, {"round": torch.tensor(0)})
        h = model.encode(data.x, data.present)["m1"]
        mean = head_input(model, "m1", h, data.present["m1"]).mean(0)
        steps = []
        for part in range(2):
            seen = dict(state)
            loss = objective.losses(model, data.batch(), seen)[part]
            g = {"head.joint.weight": torch.autograd.grad(loss, model.head["joint"].weight)[0]}
            steps.append(objective.edit_gradients(g, {}, seen)["head.joint.weight"])
            state = {n: seen[n] for n in state}
        moved[project] = float((steps[1] @ mean).norm() / steps[1].norm())
    assert moved[True] < 0.1 * moved[False]


def test_the_hard_modality_learns_more_than_under_joint_training():
    gains = []
    for seed in range(2):
        joint, turns = (
            easy_first.nearest_prototype(easy_first.trained(o, seed, **SUM)) for o in (Joint(), Alternating())
        )
        gains.append(turns["m2"] - joint["m2"])
    assert sum(gains) / 2 > 0.04


def test_late_fusion_has_nothing_to_project():
    ends = []
    for project in (True, False):
        model = tiny.model(tiny.names(2), 0, None, fusion="late")
        data = tiny.data(tiny.names(2), 9)
        schedule = LocalSchedule(1, 4, 0.1, 0.0, 0.0)
        train(model, Alternating(project=project), data, data.modalities, {"round": torch.tensor(0)}, schedule, 0, 0)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("switches", [{"division": "outer"}, {"project": False}], ids=str)
def test_variants_keep_the_contract(switches):
    check_objective(Alternating(**switches))


def test_the_real_loop(tmp_path):
    hashes = []
    for project in (True, True, False):
        config = tiny.config("mla", objective__project=project, **easy_first.MIXED)
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
