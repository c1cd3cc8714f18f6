"""The naming contract: every parameter and buffer belongs to one block, and blocks are all that a server keys on.

encoder.<modality>.                       the modality's feature extractor
projector.<modality>.<self|infiltration>. the two projectors of FedCMI
fusion.                                   parameters of the fusion, if it has any
head.joint.                               classifier on the fused feature
head.<modality>.                          classifier of one modality alone
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedmm.errors import ConfigError

_PARTS = {"encoder": 2, "projector": 3, "fusion": 1, "head": 2}


def block_of(name: str) -> str:
    """Block of a parameter or buffer, e.g. "encoder.audio.net.0.weight" -> "encoder.audio".

    Raises:
        ConfigError: The name does not begin with a block.
    """
    parts = name.split(".")
    depth = _PARTS.get(parts[0])
    if depth is None or len(parts) <= depth:
        raise ConfigError(
            f'tensor "{name}" belongs to no block',
            where="model",
            remedy="begin names with encoder.<modality>., projector.<modality>.<self|infiltration>., fusion., "
            "head.joint. or head.<modality>.",
        )
    return ".".join(parts[:depth])


def modality_of(block: str) -> str | None:
    """The modality that a block serves, or None for blocks that all share (fusion, head.joint)."""
    parts = block.split(".")
    return None if parts[0] == "fusion" or parts[-1] == "joint" else parts[1]


def blocks_of(names: Iterable[str]) -> tuple[str, ...]:
    """All blocks among tensor names, in order of first appearance."""
    return tuple(dict.fromkeys(block_of(name) for name in names))


def serves(name: str, modalities: Iterable[str]) -> bool:
    """Whether the tensor's block is shared or serves one of the modalities."""
    modality = modality_of(block_of(name))
    return modality is None or modality in set(modalities)


def bytes_per_block(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Payload bytes of each block."""
    total: dict[str, int] = {}
    for name, tensor in tensors.items():
        block = block_of(name)
        total[block] = total.get(block, 0) + tensor.numel() * tensor.element_size()
    return total


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor is averaged (float) or takes the maximum (integer buffers, e.g. step counters)."""
    return torch.is_floating_point(tensor)
