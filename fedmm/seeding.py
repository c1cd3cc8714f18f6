"""One seed tree: every random stream is derived from (run seed, purpose, path), never from global state.

`derive` hashes the path, so that a new purpose or a new client never shifts an existing stream.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, *path: int) -> int:
    """Return a 63-bit seed that depends on all arguments and on nothing else.

    Args:
        seed: The run's seed.
        purpose: What the stream is for, e.g. "batches" or "selection".
        *path: Where in the run the stream is used, e.g. round and client.
    """
    text = "/".join([str(seed), purpose, *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, purpose: str, *path: int) -> np.random.Generator:
    """A NumPy generator for one purpose and place; arguments as in `derive`."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *path)))


def torch_rng(seed: int, purpose: str, *path: int) -> torch.Generator:
    """A CPU torch generator for one purpose and place; arguments as in `derive`."""
    return torch.Generator().manual_seed(derive(seed, purpose, *path))
