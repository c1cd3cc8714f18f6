"""Fusions of any number of modality features [..., B, d] into one [..., B, width] for the joint head.

Each gets features that are zero where a modality is absent, and masks [..., B, 1] that say so, since a bias must not
speak for an absent modality. A leading axis stacks clients; their layers are then `fedmm.models.stacked`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fedmm.types import Tensors


class Concat(nn.Module):
    """[z^1; ...; z^M], zeros for the absent; the papers' default. No parameters."""

    def __init__(self, modalities: Sequence[str], features: int) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), len(modalities) * features

    def forward(self, z: Tensors, mask: Tensors) -> Tensor:
        """Fuse features [..., B, d] under masks [..., B, 1] into [..., B, width]."""
        return torch.cat([z[m] for m in self.modalities], dim=-1)


class Sum(nn.Module):
    """sum_m W_m z^m + b_m over the present modalities."""

    def __init__(self, modalities: Sequence[str], features: int) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), features
        self.linear = nn.ModuleDict({m: nn.Linear(features, features) for m in modalities})

    def forward(self, z: Tensors, mask: Tensors) -> Tensor:
        """Fuse features [..., B, d] under masks [..., B, 1] into [..., B, width]."""
        return torch.stack([mask[m] * self.linear[m](z[m]) for m in self.modalities]).sum(0)


class Gated(nn.Module):
    """Gated multimodal unit: sum_m sigmoid(G_m [z^1; ...; z^M]) * tanh(W_m z^m) (Arevalo et al., 2017)."""

    def __init__(self, modalities: Sequence[str], features: int) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), features
        self.linear = nn.ModuleDict({m: nn.Linear(features, features) for m in modalities})
        self.gate = nn.ModuleDict({m: nn.Linear(len(modalities) * features, features) for m in modalities})

    def forward(self, z: Tensors, mask: Tensors) -> Tensor:
        """Fuse features [..., B, d] under masks [..., B, 1] into [..., B, width]."""
        together = torch.cat([z[m] for m in self.modalities], dim=-1)
        parts = [
            mask[m] * torch.sigmoid(self.gate[m](together)) * torch.tanh(self.linear[m](z[m])) for m in self.modalities
        ]
        return torch.stack(parts).sum(0)


class FiLM(nn.Module):
    """The first modality scales and shifts the others: sum_m gamma(z^1) * W_m z^m + beta(z^1) (Perez et al., 2018).

    Without the first modality gamma = 1 and beta = 0; without the others only beta speaks. With a single
    modality it is that modality's linear map.
    """

    def __init__(self, modalities: Sequence[str], features: int) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), features
        self.scale = nn.Linear(features, features)
        self.shift = nn.Linear(features, features)
        self.linear = nn.ModuleDict({m: nn.Linear(features, features) for m in modalities[1:]})

    def forward(self, z: Tensors, mask: Tensors) -> Tensor:
        """Fuse features [..., B, d] under masks [..., B, 1] into [..., B, width]."""
        first, *others = self.modalities
        gamma = mask[first] * self.scale(z[first]) + (1 - mask[first])
        beta = mask[first] * self.shift(z[first])
        return torch.stack([beta, *[gamma * mask[m] * self.linear[m](z[m]) for m in others]]).sum(0)


class MLP(nn.Module):
    """ReLU(W [z^1; ...; z^M] + b): concatenation with one hidden layer."""

    def __init__(self, modalities: Sequence[str], features: int) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), features
        self.linear = nn.Linear(len(modalities) * features, features)

    def forward(self, z: Tensors, mask: Tensors) -> Tensor:
        """Fuse features [..., B, d] under masks [..., B, 1] into [..., B, width]."""
        return torch.relu(self.linear(torch.cat([z[m] for m in self.modalities], dim=-1)))


FUSIONS: Mapping[str, type[Concat] | type[Sum] | type[Gated] | type[FiLM] | type[MLP]] = MappingProxyType(
    {"concat": Concat, "sum": Sum, "gated": Gated, "film": FiLM, "mlp": MLP}
)
