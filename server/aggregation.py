"""Block-wise aggregation: each block is the weighted mean over the clients that trained it, in float64.

    w_b = sum_k n_k w_{k,b} / sum_k n_k      over the clients k that trained block b; nobody did: w_b stays

Sums run over a fixed tree of the clients' places in the round (`fedmm.trees`): a partial sum over an aligned run of
whole leaves is a node of that tree, wherever it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedmm.models.blocks import block_of, blocks_of, is_float, modality_of
from fedmm.models.width import Shapes, held_mean, padded
from fedmm.trees import Run, combine, run_sum, tree_sum, tree_sum_stack
from fedmm.types import Tensors

__all__ = ["Change", "Gathered", "Update", "blockwise_mean", "merge_reports", "tree_sum", "update_norm"]


@dataclass(frozen=True)
class Update:
    """An admitted reply to a train message.

    Attributes:
        client: Partition index.
        samples: n_k, the weight.
        modalities: Modalities that were trained.
        model: Tensors of the trained blocks; empty where a worker has already added them to a sum.
        report: Sums and counts.
        loss: Mean local loss.
        complete: All of the client's modalities were trained (not a weak-only pick).
        steps: Optimiser steps done.
        place: Place in the round's order, which fixes the order of sums; None: by client.
        blocks: Blocks that were trained, where `model` does not say.
        held: Shapes of tensors of which the client holds a leading corner alone (`fedmm.models.width`).
        lr: Local learning rate.
    """

    client: int
    samples: int
    modalities: tuple[str, ...]
    model: Tensors
    report: Tensors
    loss: float
    complete: bool
    steps: int = 0
    place: int | None = None
    blocks: tuple[str, ...] | None = None
    held: Shapes = field(default_factory=dict)
    lr: float = 1.0

    @property
    def trained(self) -> tuple[str, ...]:
        """Blocks that were trained."""
        return blocks_of(self.model) if self.blocks is None else self.blocks


@dataclass(frozen=True)
class Change:
    """How the models of some clients moved: tensor name -> sent less trained, [g, *shape], matrices `turned`."""

    clients: tuple[int, ...]
    rows: Tensors


@dataclass(frozen=True)
class Gathered(Sequence[Update]):
    """The updates of a round, sorted by client, with what workers have already added up.

    Attributes:
        updates: Sorted by client.
        sums: Run of places -> sum of weight x tensor over its updates that hold no model themselves.
        changes: Movements, where the server asked for them.
        leaf: Places of a leaf of the tree of sums.
    """

    updates: tuple[Update, ...]
    sums: Mapping[Run, Tensors] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    leaf: int = 1

    def __len__(self) -> int:
        return len(self.updates)

    def __getitem__(self, index: int) -> Update:  # type: ignore[override]
        return self.updates[index]

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)


def blockwise_mean(
    previous: Tensors,
    updates: Sequence[Update],
    *,
    weight: Callable[[Update], float] | None = None,
    min_owners: int = 1,
) -> Tensors:
    """The block-wise weighted mean of the module's text.

    Args:
        previous: Global model; kept where nobody trained.
        updates: Admitted updates, any order.
        weight: Weight of a client (n_k by default); for `Gathered` sums, the one that they were made with.
        min_owners: Blocks of a modality that fewer clients trained keep their value.

    Returns:
        A new global model with the names, shapes and dtypes of `previous`. Float buffers are averaged with their
        block, integer buffers take the maximum. Where clients hold parts of a tensor, each entry is the mean over
        those who hold it.
    """
    placed = all(u.place is not None for u in updates)
    ordered = sorted(updates, key=lambda u: u.place if placed else u.client)  # type: ignore[arg-type,return-value]
    by_place = {(u.place if placed else i): u for i, u in enumerate(ordered)}
    weights = {p: float(u.samples) if weight is None else weight(u) for p, u in by_place.items()}
    alike: dict[tuple[str, ...], list[int]] = {}
    for p, u in by_place.items():
        alike.setdefault(u.trained, []).append(p)  # type: ignore[arg-type]
    owners = {
        block: sorted(p for blocks, those in alike.items() if block in blocks for p in those)
        for block in dict.fromkeys(b for blocks in alike for b in blocks)
    }
    mass = {block: sum(weights[p] for p in mine) for block, mine in owners.items()}
    narrow = any(u.held for u in updates)

    gathered = updates if isinstance(updates, Gathered) else Gathered(tuple(updates))

    def leaf(start: int, span: int) -> Tensors | None:
        held: dict[str, list[tuple[list[int], torch.Tensor]]] = {}
        there = [p for p in range(start, start + span) if p in by_place and by_place[p].model]
        for p in there:
            for n, t in by_place[p].model.items():
                if is_float(t):
                    held.setdefault(n, []).append(([p - start], padded(t, previous[n].shape).unsqueeze(0)))
        factors = torch.tensor(
            [weights[p] if p in there else 0.0 for p in range(start, start + span)], dtype=torch.float64
        )
        return run_sum(held, factors, span) if held else None

    places = max(p for p in by_place if p is not None) + 1
    total = combine(gathered.sums, places, leaf, gathered.leaf)
    result: Tensors = {}
    for name, old in previous.items():
        mine = owners.get(block_of(name), [])
        enough = min_owners if modality_of(block_of(name)) is not None else 1
        if len(mine) < enough:
            result[name] = old
        elif not is_float(old):
            result[name] = torch.stack([by_place[p].model[name] for p in mine]).amax(0)
        elif narrow and any(name in by_place[p].held for p in mine):
            holders = [(by_place[p].held.get(name, old.shape), weights[p]) for p in mine]
            result[name] = held_mean(total[name], holders, old).to(old.dtype)
        else:
            result[name] = (total[name] / mass[block_of(name)]).to(old.dtype)
    return result


def merge_reports(reports: Sequence[Tensors]) -> Tensors:
    """Add sums and counts of several clients, given in sorted order, over the fixed tree."""
    names = dict.fromkeys(name for report in reports for name in report)
    merged: Tensors = {}
    for name in names:
        terms = [report[name] for report in reports if name in report]
        if len(terms) == len(reports):
            merged[name] = tree_sum_stack(torch.stack(terms))
            continue
        total = tree_sum([report.get(name) for report in reports])
        assert total is not None
        merged[name] = total
    return merged


def update_norm(model: Mapping[str, torch.Tensor], sent: Mapping[str, torch.Tensor]) -> float:
    """L2 distance between an update and the sent model, over float tensors of the update."""
    parts = [(t.to(torch.float64) - sent[n].to(torch.float64)).square().sum() for n, t in model.items() if is_float(t)]
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0
