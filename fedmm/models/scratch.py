"""Memory for what a step needs at once and never again, in the processor's cache.

A process keeps `KEPT` bytes a role and type of numbers (five roles: 10 MiB), and in `fedmm.models.windows` at most 64
images of up to `KEPT` bytes with their margins. Whatever is larger is allocated when it is needed.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

KEPT = 2**21
"""Bytes up to which a piece of memory stays allocated for the next step: what a processor's second cache holds."""


def scratch(role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for what a step needs at once and never again: the same for all of one role, thus in the cache."""
    size = prod(shape)
    if size * dtype.itemsize > KEPT:
        return torch.empty(shape, dtype=dtype)
    return _scratch(role, dtype)[:size].view(shape)


@lru_cache(maxsize=16)
def _scratch(role: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(KEPT // dtype.itemsize, dtype=dtype)
