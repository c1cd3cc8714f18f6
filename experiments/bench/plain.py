"""The two networks in plain PyTorch, without masks or blocks: what a loop without federation would train.

Imports torch alone, so that it also runs where fedmm's dependencies are not installed.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, cat, nn, relu
from torch.nn import functional as F


class TwoTowers(nn.Module):
    """Two encoders, a fusion layer with ReLU, and a linear head; parameters in the order of fedmm's model.

    Args:
        family: mlp or cnn.
        shapes: Shape of one sample of each modality.
        width: Hidden width, or base channels.
        features: Width of the features.
        classes: Number of classes.
    """

    def __init__(self, family: str, shapes: list[list[int]], width: int, features: int, classes: int) -> None:
        super().__init__()
        tower = {"mlp": _dense, "cnn": _convolutional}[family]
        self.towers = nn.ModuleList([tower(shape, width, features) for shape in shapes])
        self.fusion = nn.Linear(len(shapes) * features, features)
        self.head = nn.Linear(features, classes)

    def forward(self, *x: Tensor) -> Tensor:
        """Logits [B, C] of one tensor [B, *shape] a modality."""
        features = cat([tower(one) for tower, one in zip(self.towers, x, strict=True)], dim=1)
        logits: Tensor = self.head(relu(self.fusion(features)))
        return logits

    def loss(self, *batch: Tensor) -> Tensor:
        """Mean cross-entropy of a batch (x of each modality, y)."""
        return F.cross_entropy(self(*batch[:-1]), batch[-1])


def _dense(shape: list[int], width: int, features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(prod(shape), width), nn.ReLU(), nn.Linear(width, features))


def _convolutional(shape: list[int], width: int, features: int) -> nn.Module:
    channels, height, breadth = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 4) * (breadth // 4), features),
    )
