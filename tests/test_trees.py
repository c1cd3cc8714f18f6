"""Sums over a tree of places: right, and the same to the last bit whoever adds up which run."""

import pytest
import torch

from fedmm.trees import add_named, combine, leaf_span, run_sum

SHAPES = {"wide": (3, 2000), "bias": (5,), "long": (4097,), "scalar": ()}


def terms(places, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(places, *shape, generator=generator).to(dtype) for n, shape in SHAPES.items()}


def held(rows, there, start=0):
    there = list(there)
    return {n: [([p - start for p in there], t[there])] for n, t in rows.items()}


def weights_of(places, seed=1):
    return torch.rand(places, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("leaf", [1, 4, 8])
def test_it_is_the_weighted_sum(leaf, dtype):
    rows, weights = terms(16, dtype=dtype), weights_of(16)
    there = [0, 1, 2, 5, 9, 10, 15]
    found = run_sum(held(rows, there), weights, leaf)
    for n, t in rows.items():
        wanted = sum(t[p].double() * weights[p] for p in there)
        assert found[n].shape == t.shape[1:]
        assert torch.allclose(found[n], wanted, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("run", [8, 16, 32])
def test_runs_of_whole_leaves_are_nodes_of_the_same_tree(run):
    places = 27
    rows, weights = terms(32), weights_of(32)

    def part(start, span):
        there = range(start, min(places, start + span))
        return run_sum(held(rows, there, start), weights[start : start + span], 8) if there else None

    nodes = {(s, run): node for s in range(0, 32, run) if (node := part(s, run))}
    joined = combine(nodes, places, leaf_span=8)
    by_leaf = combine({}, places, part, 8)
    whole = part(0, 32)
    for n in SHAPES:
        assert torch.equal(joined[n], whole[n])
        assert torch.equal(by_leaf[n], whole[n])


def test_neither_holders_nor_layout_nor_neighbours_change_a_bit():
    rows, weights = terms(8), weights_of(8)
    whole = run_sum(held(rows, range(8)), weights, 8)
    one_by_one = {n: [([p], t[p : p + 1]) for p in range(8)] for n, t in rows.items()}
    odd_and_even = {n: [([1, 3, 5, 7], t[1::2]), ([0, 2, 4, 6], t[0::2])] for n, t in rows.items()}
    turned = {
        n: [(list(range(8)), t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t)]
        for n, t in rows.items()
    }
    backwards = dict(reversed(held(rows, range(8)).items()))
    for other in (one_by_one, odd_and_even, turned, backwards):
        found = run_sum(other, weights, 8)
        assert all(torch.equal(found[n], whole[n]) for n in SHAPES)
    alone = {n: run_sum({n: h}, weights, 8)[n] for n, h in held(rows, range(8)).items()}
    assert all(torch.equal(alone[n], whole[n]) for n in SHAPES)


def test_what_the_absent_held_before_is_not_added():
    rows, weights = terms(8), weights_of(8)
    mixed = held(rows, range(8)) | {"bias": [([2], rows["bias"][2:3])], "scalar": [([6, 7], rows["scalar"][6:])]}
    found = run_sum(mixed, weights, 8)
    assert torch.equal(found["bias"], rows["bias"][2].double() * weights[2])
    assert torch.allclose(found["scalar"], (rows["scalar"][6:].double() * weights[6:]).sum())


def test_a_term_that_is_not_finite_shows_in_its_own_sum_alone():
    rows, weights = terms(8), weights_of(8)
    rows["bias"][3, 1] = torch.inf
    found = run_sum(held(rows, range(8)), weights, 8)
    assert not torch.isfinite(found["bias"][1])
    assert all(torch.isfinite(t).all() for n, t in found.items() if n != "bias")
    assert torch.isfinite(found["bias"][[0, 2, 3, 4]]).all()


def test_a_tensor_that_only_one_node_has_passes_through():
    a, b = {"x": torch.ones(1)}, {"x": torch.ones(1), "y": torch.ones(2)}
    both = add_named(a, b)
    assert both["x"].item() == 2.0
    assert torch.equal(both["y"], b["y"])
    assert add_named(None, None) is None


@pytest.mark.parametrize(
    ("numbers", "most", "places"),
    [(100, 32, 8), (100, 4, 4), (100, 1, 1), (10**6, 32, 4), (11 * 10**6, 32, 1), (0, 32, 8)],
)
def test_large_models_have_small_leaves(numbers, most, places):
    assert leaf_span(numbers, most) == places
