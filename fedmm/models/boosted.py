"""Boosted classifiers: several heads on one encoder, added one at a time (AUG, Jiang et al., NeurIPS 2025).

    z_j^m = W ReLU(V_j^m h^m + a_j^m) + b        j = 0 .. slots;  W, b: one last layer for all heads of all modalities
    o^m   = sum_{j < n^m} z_j^m

Tensors, all there from the start, so that a model's shapes never change:

    head.<m>.boost.<j>.weight, .bias    V_j^m, a_j^m; each drawn from a stream of its own
    head.<m>.open.weight [slots]        1 for each added head that counts, else 0; nothing trains it, the server sets it
    head.joint.weight, .bias            W, b
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = Callable[[Tensor], Tensor]


class Gate(nn.Module):
    """Numbers that travel with the weights and never train.

    They are read as open above one half: the mean over clients that agree need not be 1 to the last bit.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots))

    def forward(self) -> Tensor:
        """Which slots are open, bool [..., slots]."""
        return self.weight.detach() > 0.5


class BoostedHead(nn.Module):
    """First layers of one modality's heads, and which of them count.

    Args:
        features: Width d of the encoder's output.
        hidden: Width of the first layers.
        slots: Most heads that can be added to the first.
    """

    def __init__(self, features: int, hidden: int, slots: int) -> None:
        super().__init__()
        self.boost = nn.ModuleList(nn.Linear(features, hidden) for _ in range(slots + 1))
        self.open = Gate(slots)

    @property
    def slots(self) -> int:
        """Most heads that can be added to the first."""
        return len(self.boost) - 1

    def count(self) -> Tensor:
        """n^m, int64 [...]: the first head, and the added ones up to the first that is closed."""
        opened: Tensor = self.open()
        return 1 + opened.long().cumprod(-1).sum(-1)

    def each(self, h: Tensor, last: Layer, heads: int) -> list[Tensor]:
        """z_j [..., B, C] of the first `heads` heads, oldest first, from features [..., B, d]."""
        return [last(F.relu(self.boost[j](h))) for j in range(heads)]

    def forward(self, h: Tensor, last: Layer) -> Tensor:
        """Logits o [..., B, C]: the sum over the heads that count."""
        count = self.count()[..., None, None]
        z = self.each(h, last, self.slots + 1)
        return torch.stack([torch.where(count > j, z_j, 0.0) for j, z_j in enumerate(z)]).sum(0)
