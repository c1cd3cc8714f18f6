"""Block-wise aggregation: float64, in one fixed order, so that neither arrival nor worker count changes a bit.

    w_b = sum_k n_k w_{k,b} / sum_k n_k      over the clients k that trained block b; nobody did: w_b stays

Sums run over a fixed binary tree of the clients sorted by partition index: a partial sum over an aligned run of
clients is a node of that tree, wherever it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmm.models.blocks import block_of, is_float, modality_of
from fedmm.types import Tensors


@dataclass(frozen=True)
class Update:
    """An admitted reply to a train message.

    Attributes:
        client: Partition index.
        samples: n_k, the weight.
        modalities: Modalities that were trained.
        model: Tensors of the trained blocks.
        report: Sums and counts.
        loss: Mean local loss.
        complete: All of the client's modalities were trained (not a weak-only pick).
    """

    client: int
    samples: int
    modalities: tuple[str, ...]
    model: Tensors
    report: Tensors
    loss: float
    complete: bool


def tree_sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Sum over a fixed binary tree of positions (neighbours first); None stands for zero.

    Args:
        terms: One entry a client, in sorted order.
    """
    level = list(terms)
    while len(level) > 1:
        level = [_add(level[i], level[i + 1] if i + 1 < len(level) else None) for i in range(0, len(level), 2)]
    return level[0] if level else None


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


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
        weight: Weight of a client (n_k by default).
        min_owners: Blocks of a modality that fewer clients trained keep their value.

    Returns:
        A new global model with the names, shapes and dtypes of `previous`. Float buffers are averaged with their
        block, integer buffers take the maximum.
    """
    ordered = sorted(updates, key=lambda u: u.client)
    weights = [float(u.samples) if weight is None else weight(u) for u in ordered]
    result: Tensors = {}
    for name, old in previous.items():
        owners = [i for i, u in enumerate(ordered) if name in u.model]
        enough = min_owners if modality_of(block_of(name)) is not None else 1
        if len(owners) < enough:
            result[name] = old
        elif not is_float(old):
            result[name] = torch.stack([ordered[i].model[name] for i in owners]).amax(0)
        else:
            total = tree_sum(
                [
                    u.model[name].to(torch.float64) * w if name in u.model else None
                    for u, w in zip(ordered, weights, strict=True)
                ]
            )
            assert total is not None
            result[name] = (total / sum(weights[i] for i in owners)).to(old.dtype)
    return result


def merge_reports(reports: Sequence[Tensors]) -> Tensors:
    """Add sums and counts of several clients, given in sorted order, over the fixed tree."""
    names = dict.fromkeys(name for report in reports for name in report)
    merged: Tensors = {}
    for name in names:
        total = tree_sum([report.get(name) for report in reports])
        assert total is not None
        merged[name] = total
    return merged


def update_norm(model: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> float:
    """L2 distance between an update and the sent model, over float tensors of the update."""
    parts = [(t.to(torch.float64) - sent[n].to(torch.float64)).square().sum() for n, t in model.items() if is_float(t)]
    return float(torch.stack(parts).sum().sqrt()) if parts else 0.0
