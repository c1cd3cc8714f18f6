"""Files that are whole or not there: write aside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from fedmm.errors import CheckpointError
from fedmm.types import Tensors


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically.

    Raises:
        OSError: The directory cannot be written.
    """
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically; keys keep their order."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=True) + "\n").encode())


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Replace a safetensors file atomically and return the SHA-256 of its bytes."""
    seen: set[int] = set()
    whole: Tensors = {}
    for name, tensor in tensors.items():
        t = tensor.detach().contiguous()
        # safetensors refuses tensors that share memory, such as the best model while it is the current one.
        whole[name] = t.clone() if t.untyped_storage().data_ptr() in seen else t
        seen.add(t.untyped_storage().data_ptr())
    content = save(whole)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, sha256: str) -> Tensors:
    """Read a safetensors file whose hash is known.

    Raises:
        CheckpointError: Missing, unreadable, or not the bytes that were written.
    """
    remedy = f"delete this checkpoint ({path.stem}.*) to go on from the one before, or start anew in another --out"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CheckpointError(
                "the checkpoint is corrupt: its hash is not the recorded one", where=str(path), remedy=remedy
            )
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}", where=str(path), remedy=remedy) from None


def weights_sha256(tensors: Tensors) -> str:
    """Hash of a model: names, dtypes, shapes and bytes, in sorted order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous()
        digest.update(f"{name}|{t.dtype}|{list(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()
