"""PMR on data whose second modality is hard: its features gather around their prototypes; the other's do not."""

import easy_first
import pytest
import tiny
import torch

from fedmm.objectives.pmr import PrototypicalRebalance
from fedmm.testing.objective import check_objective


def test_the_slower_modality_is_lifted():
    """Accuracy of the nearest prototype in the hard modality, with and without the loss on the slower one."""
    gains = {"m1": [], "m2": []}
    for seed in range(2):
        off, on = (
            easy_first.nearest_prototype(easy_first.trained(PrototypicalRebalance(alpha=a), seed)) for a in (0.0, 4.0)
        )
        for m in gains:
            gains[m].append(on[m] - off[m])
    assert sum(gains["m2"]) / 2 > 0.1
    assert sum(gains["m2"]) > sum(gains["m1"])


def test_prototypes_follow_the_model_over_the_epochs():
    """With memory 1 the first epoch's prototypes stay; with less of it a second epoch ends elsewhere."""
    ends = [
        easy_first.weights(PrototypicalRebalance(memory=memory), epochs) for epochs in (1, 2) for memory in (0.2, 0.9)
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[2], ends[3])


@pytest.mark.parametrize("switches", [{"entropy": 0.3, "entropy_rounds": 100}, {"alpha": 0.0}], ids=str)
def test_variants_keep_the_contract(switches):
    check_objective(PrototypicalRebalance(**switches))


def test_the_real_loop(tmp_path):
    hashes = []
    for alpha in (1.0, 1.0, 0.0):
        config = tiny.config("pmr", objective__alpha=alpha, train__local_epochs=2, **easy_first.MIXED)
        summary = tiny.run(tmp_path / str(len(hashes)), config)
        assert summary["status"] == "completed"
        hashes.append(summary["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
