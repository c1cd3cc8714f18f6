"""What a server keeps of replies: directions and dominance (prototypes and imbalance: see the reference tests)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from server import directions
from server.aggregation import Change, Gathered, Update
from server.directions import distances, sketch
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


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("memory", [directions.MEMORY, 0])
@pytest.mark.parametrize("kind", [Directions, WholeDirections])
def test_what_workers_say_of_changes_is_what_models_say(kind, memory, look, monkeypatch):
    """Whenever the vectors are looked at; workers' matrices are transposed."""
    monkeypatch.setattr(directions, "MEMORY", memory)
    monkeypatch.setattr(directions, "WIDTH", 4)
    sent = SENT | {"encoder.b.w": torch.arange(6.0).view(2, 3), "head.joint.w": torch.arange(4.0).view(1, 4)}
    rng = torch.Generator().manual_seed(0)
    told, asked = kind(FEDERATES), kind(FEDERATES)
    together = ((0, 1), MODALITIES, True), ((2,), ("a",), True)
    for groups in (together, together, (((1,), ("b",), False), ((0,), MODALITIES, True)), ()):
        changes, plain = [], []
        for clients, modalities, complete in groups:
            names = [n for n in sent if n.startswith("head") or n.split(".")[1] in modalities]
            models = {n: torch.randn(len(clients), *sent[n].shape, generator=rng) for n in names if n[-1] != "s"}
            plain += [
                Update(k, 10, modalities, {n: t[i] for n, t in models.items()}, {}, 0.0, complete)
                for i, k in enumerate(clients)
            ]
            moved = {n: sent[n] - t for n, t in models.items()}
            changes.append(Change(clients, {n: t.mT if t.dim() == 3 else t for n, t in moved.items()}))
        plain.sort(key=lambda u: u.client)
        told.learn(sent, Gathered(tuple(replace(u, model={}) for u in plain), changes=tuple(changes)))
        asked.learn(sent, plain)
        if look:
            assert all(torch.equal(told.vectors(key), asked.vectors(key)) for key in told.kinds())
    assert told.tensors.keys() == asked.tensors.keys()
    assert all(torch.equal(told.tensors[n], t) for n, t in asked.tensors.items())


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


# -- bulk rows, sketches, distances of many ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Directions, WholeDirections])
@pytest.mark.parametrize("memory", [directions.MEMORY, 0])
def test_rows_in_bulk_are_what_updates_give(kind, memory, monkeypatch):
    monkeypatch.setattr(directions, "MEMORY", memory)
    monkeypatch.setattr(directions, "WIDTH", 2)
    one, two = bootstrapped(kind), kind(FEDERATES)
    shifts = torch.tensor([[1.0], [2.0], [3.0]])
    for key in two.kinds():
        names = two.covered(key, SENT)
        rows = torch.cat([shifts.expand(3, SENT[n].numel()) for n in names], 1)
        lacked = torch.cat([torch.full((SENT[n].numel(),), n.startswith("encoder.b")) for n in names])
        rows[2, lacked] = 0
        two.learn_rows(key, [0, 1, 2], rows)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[n], t) for n, t in two.tensors.items())
    assert one.metrics() == two.metrics() == ({} if memory else {("fused", "direction_sketch"): 2.0})


def test_coordinates_follow_sorted_names():
    known = Directions(FEDERATES)
    assert known.covered("joint", SENT) == ["encoder.a.b", "encoder.a.w", "encoder.b.w"]
    assert known.covered("encoder.b", SENT) == ["encoder.b.w"]
    assert WholeDirections(FEDERATES).covered("whole", SENT)[-1] == "head.joint.w"


def test_a_vector_is_kept_whole_up_to_the_budget_and_as_its_sketch_above():
    clients, length = 64, 1000
    known = Directions(Federates(("a",), (("a",),) * clients, (1,) * clients))
    rows = torch.randn(clients, length, generator=torch.Generator().manual_seed(0))
    known.learn_rows("joint", range(clients), rows)
    assert torch.equal(known.vectors("joint"), rows)
    long = directions.MEMORY // (4 * clients)
    for extra, width in ((0, long), (1, directions.WIDTH)):
        known = Directions(Federates(("a",), (("a",),) * clients, (1,) * clients))
        known.learn_rows("joint", [5], torch.ones(1, long + extra))
        assert known.vectors("joint").shape == (clients, width)


@pytest.mark.parametrize("width", [64, 256])
def test_sketched_distances_are_unbiased_and_within_their_tolerance(width):
    rng = np.random.default_rng(0)
    # Few large coordinates among many small ones, as gradients have them.
    v = torch.tensor(rng.normal(size=(50, 70_000)) * rng.lognormal(0, 1.5, 70_000), dtype=torch.float32)
    pairs = np.triu_indices(50, 1)
    estimates = np.stack([distances(sketch(v, width, seed))[pairs] for seed in range(8)])
    ratio = (estimates / distances(v)[pairs]) ** 2
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 1.2 * (2 / width) ** 0.5
    assert np.abs(np.sqrt(ratio) - 1).max() < 6 / (2 * width) ** 0.5


def test_a_sketch_is_linear_repeatable_and_alone_decided_by_its_seed():
    v = torch.randn(6, 70_000, generator=torch.Generator().manual_seed(0))
    all_at_once = sketch(v, 256, seed=1)
    assert torch.equal(all_at_once, torch.cat([sketch(row[None], 256, seed=1) for row in v]))
    assert not torch.equal(all_at_once, sketch(v, 256, seed=2))
    assert sketch(v[:1] - 2 * v[1:2], 256, 1) == pytest.approx(all_at_once[:1] - 2 * all_at_once[1:2], abs=1e-3)
    assert torch.equal(sketch(v[:, :256], 256, seed=1), v[:, :256])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_distances_of_twins(normalise, dtype, monkeypatch):
    """Right also for twins and near twins far from the origin, and zero for clients without vectors."""
    monkeypatch.setattr(directions, "DOUBLE", 2000 if dtype is np.float64 else 10)
    rng = np.random.default_rng(1)
    v = rng.normal(size=(700, 20)) + 100
    v[1], v[2] = v[0], v[0] * (1 + 1e-7 * rng.normal(size=20))
    v[3:5] = 0
    vectors = torch.tensor(v)
    D = distances(vectors, normalise)
    assert D.dtype == dtype
    assert np.array_equal(D, D.T)
    assert not D.diagonal().any()
    assert D[0, 1] == D[3, 4] == 0
    lengths = np.linalg.norm(v, axis=1, keepdims=True)
    w = v / np.where(lengths > 0, lengths, 1) if normalise else v
    exact = np.array([np.linalg.norm(w - row, axis=1) for row in w])
    precise = 1e-6 if dtype is np.float32 else 1e-9
    np.testing.assert_allclose(D, exact, rtol=precise, atol=1e-15)
    vectors[[6, 2, 650]] = torch.tensor(rng.normal(size=(3, 20)) + 100)
    refreshed = distances(vectors, normalise, [2, 6], D)
    assert refreshed is D
    assert distances(vectors, normalise, [650], D) is D
    assert np.array_equal(D, D.T)
    np.testing.assert_allclose(D, distances(vectors, normalise), rtol=precise)


@pytest.mark.parametrize("few", [True, False])
def test_kept_distances_follow_what_is_learned(few, monkeypatch):
    monkeypatch.setattr(directions, "DOUBLE", 2000 if few else 10)
    clients, generator = 40, torch.Generator().manual_seed(0)
    known = Directions(Federates(("a",), (("a",),) * clients, (1,) * clients))
    rows = torch.randn(clients, 6, generator=generator)
    known.learn_rows("joint", range(clients), rows)
    assert known.distances("joint").dtype == (np.float64 if few else np.float32)
    known.distances("joint", normalise=True)
    rows[[3, 30]] = torch.randn(2, 6, generator=generator)
    known.learn_rows("joint", [30, 3], rows[[30, 3]])
    for normalise in (False, True):  # to the bit: a run that is resumed knows the vectors alone
        assert np.array_equal(known.distances("joint", normalise), distances(rows, normalise))
    # Another tensor, as from a checkpoint.
    known.tensors = {"direction.joint": rows.flip(0)}
    np.testing.assert_allclose(known.distances("joint"), distances(rows.flip(0)), rtol=1e-6)


def test_distances_of_too_many_clients_are_not_kept(monkeypatch):
    monkeypatch.setattr(directions, "STORED", 39)
    known = Directions(Federates(("a",), (("a",),) * 40, (1,) * 40))
    known.learn_rows("joint", range(40), torch.zeros(40, 2))
    with pytest.raises(ValueError, match="40 clients"):
        known.distances("joint")


@pytest.mark.parametrize("normalise", [False, True])
def test_single_precision_is_enough_for_distances_and_does_not_depend_on_what_is_computed_with_it(normalise):
    """Near pairs included; rows brought up to date are, to the bit, those of a run that was resumed."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(60, 9000)) + 3 * rng.normal(size=9000)
    v[1] = v[0] + 0.01 * rng.normal(size=9000)
    v[2] = v[0] + 1e-4 * rng.normal(size=9000)
    vectors = torch.tensor(v, dtype=torch.float32)
    w = vectors.numpy().astype(np.float64)
    w = w / np.linalg.norm(w, axis=1, keepdims=True) if normalise else w
    D = distances(vectors, normalise)
    np.testing.assert_allclose(D, [np.linalg.norm(w - row, axis=1) for row in w], rtol=3e-6, atol=1e-15)
    for rows in ([7], [0, 2, 59], list(range(3, 40))):
        known = D.copy()
        known[rows] = known[:, rows] = -1
        assert np.array_equal(distances(vectors, normalise, rows, known), D)
