"""One fixed order of addition: sums over clients run over a tree of their places.

A leaf of the tree is an aligned run of a few places, whose weighted terms are added up by one matrix product; above
the leaves the tree is binary. A node covers an aligned run of places; whoever adds up a run, in whatever process, gets
the same bits. None stands for a place without a term, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedmm import native
from fedmm.types import Tensors

_COLUMNS = 2**12
"""Numbers of a client that are added up at a time, in a buffer that stays in the processor's cache."""

_ON_CARD = 2**23
"""Numbers of all clients that are added up at a time on other devices, where calls are what takes time."""

_LEAF = 8
_HELD = 2**22
"""Most places of a leaf, and most numbers that whoever adds it up may have to hold for it."""

Run = tuple[int, int]
"""First place of an aligned run, and its length, a power of two."""

Held = Sequence[tuple[Sequence[int], Tensor]]
"""Terms of some places: which places of the leaf, ascending, and a row each, [n, *shape]."""


def tree_sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Sum over a fixed binary tree of places (neighbours first); None stands for zero.

    Args:
        terms: One entry a place.
    """
    level = list(terms)
    while len(level) > 1:
        level = [_add(level[i], level[i + 1] if i + 1 < len(level) else None) for i in range(0, len(level), 2)]
    return level[0] if level else None


def tree_sum_stack(level: Tensor) -> Tensor:
    """`tree_sum` of the rows of [K, ...], K > 0, which is spoilt."""
    while len(level) > 1:
        pairs = 2 * (len(level) // 2)
        level[0:pairs:2].add_(level[1:pairs:2])
        level = level[0::2]
    return level[0]


def run_sum(terms: Mapping[str, Held], weights: Tensor, leaf: int) -> Tensors:
    """The node of an aligned run of places: sum of weight times term; places without a term count as zero.

    Every number is a column of products of the same shape, whichever tensor it belongs to and whoever holds it: so
    its leaves are summed in one and the same order.

    Args:
        terms: Name -> who holds it, any float type; at least one.
        weights: float64 [places of the run].
        leaf: Places of a leaf, at most those of the run.

    Returns:
        Name -> float64 [*shape].
    """
    span, sizes = len(weights), {n: held[0][1][0].numel() for n, held in terms.items()}
    if span == 1:
        return {n: rows[0].to(torch.float64) * weights[0] for n, ((_, rows),) in terms.items()}
    if native.usable(*(rows for held in terms.values() for _, rows in held)):
        return _natively(terms, weights, leaf)
    width = _COLUMNS if weights.device.type == "cpu" else max(_COLUMNS, _ON_CARD // span)
    # Leaves without a term are left out: row of each place in those that remain.
    inhabited = sorted({place // leaf for held in terms.values() for which, _ in held for place in which})
    row = {leaf * at + i: leaf * number + i for number, at in enumerate(inhabited) for i in range(leaf)}
    leaves, nodes = weights.new_zeros(len(inhabited), leaf, width), weights.new_empty(len(inhabited), 1, width)
    columns, factors = leaves.flatten(0, 1), weights.view(-1, 1, leaf)[inhabited]
    sums = weights.new_empty(-(-sum(sizes.values()) // width), width)
    root, pairs = _pairs(dict(zip(inhabited, nodes.squeeze(1).unbind(0), strict=True)), span // leaf)
    chunks = sums.unbind(0)

    def add_up(chunk: int) -> None:
        torch.bmm(factors, leaves, out=nodes)
        for left, right in pairs:
            left.add_(right)
        chunks[chunk].copy_(root)

    # In the order of memory, whatever the order of axes: a stack's weights are transposed views.
    axes = {n: _axes(held[0][1]) for n, held in terms.items()}
    done, written = 0, set[int]()
    for n, held in terms.items():
        mine = [([row[place] for place in which], rows) for which, rows in held]
        flat = [(_places(which), rows.permute(0, *axes[n]).reshape(len(which), -1)) for which, rows in mine]
        there = {place for which, _ in mine for place in which}
        empty, written = sorted(written - there), written | there
        at = 0
        while at < sizes[n]:
            first = done % width
            count = min(sizes[n] - at, width - first)
            part = columns[:, first : first + count]
            if empty:
                part[empty] = 0.0
            for which, rows in flat:
                if isinstance(which, slice):
                    part[which].copy_(rows[:, at : at + count])
                else:
                    part.index_copy_(0, which.to(part.device), rows[:, at : at + count].to(part.dtype))
            at, done = at + count, done + count
            if done % width == 0:
                add_up(done // width - 1)
    if done % width:
        add_up(done // width)
    found: Tensors = {}
    for (n, held), total in zip(terms.items(), torch.split(sums.flatten()[:done], list(sizes.values())), strict=True):
        shape = held[0][1].shape
        back = sorted(range(len(axes[n])), key=axes[n].__getitem__)
        found[n] = total.view([shape[a] for a in axes[n]]).permute(back)
    return found


def _natively(terms: Mapping[str, Held], weights: Tensor, leaf: int) -> Tensors:
    """The node, by the compiled kernel."""
    axes = [_axes(held[0][1]) for held in terms.values()]
    flat = [
        [(which, _in_one_piece(rows.permute(0, *order).reshape(len(which), -1))) for which, rows in held]
        for held, order in zip(terms.values(), axes, strict=True)
    ]
    found: Tensors = {}
    for (n, held), order, total in zip(terms.items(), axes, native.trees(flat, weights, leaf), strict=True):
        shape = held[0][1].shape
        found[n] = total.view([shape[a] for a in order]).permute(sorted(range(len(order)), key=order.__getitem__))
    return found


def _in_one_piece(rows: Tensor) -> Tensor:
    return rows if rows[0].is_contiguous() else rows.contiguous()


def _pairs(leaves: Mapping[int, Tensor], count: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The leaf that holds the root once each second of a pair has been added to its first, and these pairs in order."""
    level, pairs = [leaves.get(i) for i in range(count)], []
    while len(level) > 1:
        above = []
        for left, right in zip(level[0::2], level[1::2], strict=True):
            if left is not None and right is not None:
                pairs.append((left, right))
            above.append(right if left is None else left)
        level = above
    (root,) = level
    assert root is not None
    return root, pairs


def _axes(rows: Tensor) -> list[int]:
    return sorted(range(1, rows.dim()), key=rows.stride().__getitem__, reverse=True)


def _places(which: Sequence[int]) -> slice | Tensor:
    """Places as an index: a slice where they follow each other."""
    if which[-1] - which[0] + 1 == len(which):
        return slice(which[0], which[-1] + 1)
    return torch.tensor(which)


def add_named(a: Tensors | None, b: Tensors | None) -> Tensors | None:
    """The node above two nodes: tensor by tensor; a tensor that only one has passes through."""
    if a is None or b is None:
        return b if a is None else a
    return {n: t if n not in b else t + b[n] for n, t in a.items()} | {n: t for n, t in b.items() if n not in a}


def combine(
    nodes: Mapping[Run, Tensors],
    places: int,
    leaf: Callable[[int, int], Tensors | None] = lambda start, span: None,
    leaf_span: int = 1,
) -> Tensors:
    """The root of a tree over `places` places.

    Args:
        nodes: Sums over disjoint aligned runs, of whole leaves.
        places: Number of places.
        leaf: (start, span) -> sum over a leaf outside these runs; None: nobody is there.
        leaf_span: Places of a leaf.
    """

    def node(start: int, span: int) -> Tensors | None:
        if (start, span) in nodes:
            return nodes[start, span]
        if start >= places:
            return None
        if span == leaf_span:
            return leaf(start, span)
        return add_named(node(start, span // 2), node(start + span // 2, span // 2))

    # A run may reach beyond the last place.
    return node(0, aligned(max([places, leaf_span, *(start + span for start, span in nodes)]))) or {}


def leaf_span(numbers: int, most: int) -> int:
    """Places of a leaf, a power of two; large models have small leaves, as a leaf's terms are held all at once.

    Args:
        numbers: Of a client's term.
        most: Power of two that it may not exceed.
    """
    return min(most, _LEAF, aligned(_HELD // max(numbers, 1) + 1) // 2 or 1)


def aligned(places: int) -> int:
    """The smallest power of two that is at least `places`."""
    return 1 << max(places - 1, 0).bit_length()


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
