"""What a server keeps of replies: directions and dominance (prototypes and imbalance: see the reference tests)."""

import pytest
import torch

from server.aggregation import Update
from server.knowledge import KNOWLEDGE, Confidence, Directions, Federates, WholeDirections

MODALITIES = ("a", "b")
FEDERATES = Federates(MODALITIES, (("a", "b"), ("a", "b"), ("a",)), (10, 20, 30))
SENT = {
    "encoder.a.w": torch.tensor([1.0, 2.0]),
    "encoder.a.b": torch.tensor([3.0]),
    "encoder.a.steps": torch.tensor(4),
    "encoder.b.w": torch.tensor([[5.0], [6.0]]),
    "head.joint.w": torch.tensor([7.0]),
}


def update(client, modalities, shift, complete):
    names = [n for n in SENT if n.startswith("head") or n.split(".")[1] in modalities]
    return Update(client, 10, modalities, {n: SENT[n] - shift for n in names}, {}, 0.0, complete)


def bootstrapped(kind=Directions):
    known = kind(FEDERATES)
    known.learn(SENT, [update(0, MODALITIES, 1, True), update(1, MODALITIES, 2, True), update(2, ("a",), 3, True)])
    return known


def test_bootstrap_fills_what_each_client_owns():
    known = bootstrapped()
    assert known.vectors("joint").tolist() == [[1.0] * 5, [2.0] * 5, [3.0, 3.0, 3.0, 0.0, 0.0]]
    assert known.vectors("encoder.a").tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert known.vectors("encoder.b").tolist() == [[1.0] * 2, [2.0] * 2, [0.0] * 2]
    assert bootstrapped(WholeDirections).vectors("whole").tolist()[2] == [3.0, 3.0, 3.0, 0.0, 0.0, 3.0]


def test_all_modalities_refresh_the_joint_vector_only():
    known = bootstrapped()
    known.learn(SENT, [update(0, MODALITIES, 8, True)])
    assert known.vectors("joint")[0].tolist() == [8.0] * 5
    assert known.vectors("encoder.a")[0].tolist() == [1.0] * 3
    assert known.vectors("joint")[1].tolist() == [2.0] * 5  # not picked: stale


def test_weak_only_refreshes_the_weak_vector_only():
    known = bootstrapped()
    known.learn(SENT, [update(0, ("b",), 8, False)])
    assert known.vectors("joint")[0].tolist() == [1.0] * 5
    assert known.vectors("encoder.b")[0].tolist() == [8.0] * 2
    assert known.vectors("encoder.a")[0].tolist() == [1.0] * 3


def test_weak_only_leaves_whole_vectors():
    known = bootstrapped(WholeDirections)
    known.learn(SENT, [update(0, ("b",), 8, False)])
    assert known.vectors("whole")[0].tolist() == [1.0] * 6


@pytest.mark.parametrize("kind", [Directions, WholeDirections])
def test_order_of_names_does_not_matter(kind):
    one, two = bootstrapped(kind), bootstrapped(kind)
    later = update(0, MODALITIES, torch.tensor([5.0]), True)
    distinct = {n: t + torch.arange(t.numel()).reshape(t.shape) for n, t in later.model.items()}
    later = Update(0, 10, MODALITIES, distinct, {}, 0.0, True)
    one.learn(SENT, [later])
    two.learn({n: SENT[n] for n in reversed(SENT)}, [later])
    assert all(torch.equal(one.tensors[n], two.tensors[n]) for n in one.tensors)


def confidence(client, **sums):
    report = {f"confidence.{m}": torch.tensor(s) for m, (s, _) in sums.items()}
    report |= {f"confidence_count.{m}": torch.tensor(float(n)) for m, (_, n) in sums.items()}
    return Update(client, 10, MODALITIES, {}, report, 0.0, True)


def test_the_larger_mean_confidence_names_the_dominant_modality():
    known = Confidence(FEDERATES)
    assert int(known.broadcast()["dominant"]) == -1
    known.learn(SENT, [confidence(0, a=(4.0, 10), b=(6.0, 10)), confidence(1, a=(9.0, 10), b=(6.5, 10))])
    assert int(known.broadcast()["dominant"]) == 0
    known.learn(SENT, [confidence(2)])  # nobody has both: the last decision stands
    assert int(known.broadcast()["dominant"]) == 0
    known.learn(SENT, [confidence(0, a=(4.0, 10), b=(6.0, 10))])
    assert int(known.broadcast()["dominant"]) == 1


@pytest.mark.parametrize("name", KNOWLEDGE)
def test_state_is_tensors_and_survives_a_round_of_no_replies(name):
    known = KNOWLEDGE[name](FEDERATES)
    known.learn(SENT, [])
    before = {n: t.clone() for n, t in known.tensors.items()}
    assert all(isinstance(t, torch.Tensor) for t in before.values())
    known.learn(SENT, [])
    assert all(torch.equal(known.tensors[n].nan_to_num(), t.nan_to_num()) for n, t in before.items())
    assert all(isinstance(t, torch.Tensor) for t in known.broadcast().values())
    assert all(isinstance(v, float) for v in known.metrics().values())
