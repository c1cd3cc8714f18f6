"""The two-projector module of FedCMI (arXiv 2401.00894): behind each encoder a self and an infiltration projector.

z_S = S(h)   feeds the fusion: what the modality itself says
z_I = I(h)   is taught by the dominant modality, and stands in for an absent one
"""

from __future__ import annotations

from torch import nn


def projector(features: int, depth: int, hidden: int | None) -> nn.Module:
    """`depth` linear layers d -> d with ReLU between; the identity for depth 0."""
    if depth == 0:
        return nn.Identity()
    hidden = hidden or features
    widths = [features, *[hidden] * (depth - 1), features]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def two_projectors(features: int, depth: int, hidden: int | None) -> nn.ModuleDict:
    """The pair of one modality, under the names that the block contract gives them."""
    return nn.ModuleDict(
        {"self": projector(features, depth, hidden), "infiltration": projector(features, depth, hidden)}
    )
