"""Aggregation in float64 over a fixed tree: order, weights, buffers, single clients."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmm.io.files import weights_sha256
from server.aggregation import Update, blockwise_mean, merge_reports, tree_sum, update_norm

MODEL = {"encoder.a.w": (3, 2), "encoder.b.w": (4,), "head.joint.w": (5,)}


def updates(seed, clients, samples=None):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(clients):
        modalities = (("a",), ("b",), ("a", "b"))[int(torch.randint(3, (), generator=generator))]
        scale = 10.0 ** float(torch.randint(-3, 4, (), generator=generator))
        model = {
            n: scale * torch.randn(s, generator=generator)
            for n, s in MODEL.items()
            if n.startswith("head") or n.split(".")[1] in modalities
        }
        n_k = samples or int(torch.randint(1, 10_000, (), generator=generator))
        found.append(Update(k, n_k, modalities, model, {}, 0.0, len(modalities) == 2))
    return {n: torch.randn(s, generator=generator) for n, s in MODEL.items()}, found


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(1, 12), data=st.data())
def test_order_of_replies_changes_no_bit(seed, clients, data):
    model, found = updates(seed, clients)
    # In double precision, where no final rounding hides the order of a sum.
    model = {n: t.double() for n, t in model.items()}
    shuffled = data.draw(st.permutations(found))
    assert weights_sha256(blockwise_mean(model, found)) == weights_sha256(blockwise_mean(model, shuffled))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(1, 12))
def test_equals_the_exactly_rounded_mean(seed, clients):
    model, found = updates(seed, clients)
    mean = blockwise_mean(model, found)
    for name, tensor in mean.items():
        owners = [u for u in found if name in u.model]
        for i, value in enumerate(tensor.flatten().tolist()):
            if not owners:
                assert value == model[name].flatten()[i].item()
                continue
            terms = [u.samples * u.model[name].flatten()[i].item() for u in owners]
            exact = math.fsum(terms) / sum(u.samples for u in owners)
            # float32 holds 24 bits; the float64 sum may be off in its last bits where terms cancel.
            slack = 1e-15 * sum(map(abs, terms)) / sum(u.samples for u in owners)
            assert abs(value - exact) <= abs(exact) * 2**-24 + slack


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), n=st.integers(1, 2**28))
def test_a_single_client_gives_exactly_its_weights(seed, n):
    model, (only,) = updates(seed, 1, n)
    mean = blockwise_mean(model, [only])
    assert all(torch.equal(mean[name], only.model.get(name, model[name])) for name in model)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), clients=st.integers(1, 12))
def test_equal_updates_are_their_mean(seed, clients):
    model, found = updates(seed, clients)
    same = [Update(u.client, u.samples, u.modalities, model, {}, 0.0, True) for u in found]
    assert all(torch.equal(blockwise_mean(model, same)[n], model[n]) for n in model)


def test_weights_are_sample_counts_over_owners_only():
    model = {"encoder.a.w": torch.zeros(1), "head.joint.w": torch.zeros(1)}
    mine = [
        Update(0, 1, ("a",), {"encoder.a.w": torch.tensor([4.0]), "head.joint.w": torch.tensor([4.0])}, {}, 0.0, True),
        Update(1, 3, ("b",), {"head.joint.w": torch.tensor([8.0])}, {}, 0.0, True),
    ]
    new = blockwise_mean(model, mine)
    assert new["encoder.a.w"].item() == 4.0
    assert new["head.joint.w"].item() == 7.0


def test_integer_buffers_take_the_maximum_and_keep_their_type():
    model = {"encoder.a.steps": torch.tensor(3), "encoder.a.mean": torch.tensor([0.0])}
    mine = [
        Update(
            k, 10, ("a",), {"encoder.a.steps": torch.tensor(s), "encoder.a.mean": torch.tensor([float(s)])}, {}, 0, True
        )
        for k, s in enumerate((5, 9, 4))
    ]
    new = blockwise_mean(model, mine)
    assert new["encoder.a.steps"].item() == 9
    assert new["encoder.a.steps"].dtype == torch.int64
    assert new["encoder.a.mean"].item() == 6.0


def test_fewer_owners_than_asked_for_leave_the_block():
    model, found = updates(1, 6)
    owners = sum("encoder.a.w" in u.model for u in found)
    assert owners
    assert not torch.equal(blockwise_mean(model, found, min_owners=owners)["encoder.a.w"], model["encoder.a.w"])
    kept = blockwise_mean(model, found, min_owners=owners + 1)
    assert torch.equal(kept["encoder.a.w"], model["encoder.a.w"])
    assert not torch.equal(kept["head.joint.w"], model["head.joint.w"])


def test_the_input_is_not_written_to():
    model, found = updates(2, 5)
    before = [weights_sha256(t) for t in (model, *[u.model for u in found])]
    blockwise_mean(model, found)
    assert before == [weights_sha256(t) for t in (model, *[u.model for u in found])]


@pytest.mark.parametrize("count", range(1, 10))
def test_partial_sums_over_aligned_runs_are_nodes_of_the_tree(count):
    generator = torch.Generator().manual_seed(count)
    terms = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(count)]
    whole = tree_sum(terms)
    for run in (1, 2, 4, 8):
        parts = [tree_sum(terms[i : i + run]) for i in range(0, count, run)]
        assert torch.equal(tree_sum(parts), whole)


def test_absent_terms_are_zero_and_nothing_is_nothing():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    assert all(tree_sum(list(p)).item() == 3.0 for p in permutations([a, None, b, None]))
    assert tree_sum([None, None]) is None
    assert tree_sum([]) is None


def test_reports_add_up_by_name():
    merged = merge_reports([{"hits": torch.tensor(1.0)}, {"hits": torch.tensor(2.0), "shown": torch.tensor(5.0)}, {}])
    assert {n: t.item() for n, t in merged.items()} == {"hits": 3.0, "shown": 5.0}


def test_norm_of_an_update_counts_what_was_trained():
    sent = {"encoder.a.w": torch.zeros(2), "encoder.a.steps": torch.tensor(0), "head.joint.w": torch.ones(1)}
    trained = {"encoder.a.w": torch.tensor([3.0, 4.0]), "encoder.a.steps": torch.tensor(7)}
    assert update_norm(trained, sent) == 5.0
    assert update_norm({}, sent) == 0.0
