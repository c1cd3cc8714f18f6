"""Arrays in one JSON file, so that the embedded data also travel inside Flower's app bundle (text files only)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmm.errors import DataError

CODEC = "zlib"


def read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Arrays and meta data of a container file.

    Args:
        path: A file that `write` made.

    Raises:
        DataError: The file is missing, is not a container, or its content does not have the recorded hash.
    """
    remedy = "restore the file from the repository, or rebuild it with `fedmm data build`"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the data file: {error.strerror}", where=str(path), remedy=remedy) from error
    try:
        body = json.loads(text)
        arrays = {name: _decode(entry) for name, entry in body["arrays"].items()}
        meta, recorded = dict(body["meta"]), str(body["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, zlib.error) as error:
        raise DataError(f"the data file is damaged: {error}", where=str(path), remedy=remedy) from error
    if content_hash(arrays, meta) != recorded:
        raise DataError("the data file's content does not match its recorded hash", where=str(path), remedy=remedy)
    return arrays, meta


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    """Write arrays and meta data (JSON values) to `path`; returns the SHA-256 of the content."""
    digest = content_hash(arrays, meta)
    body = {
        "arrays": {name: _encode(arrays[name]) for name in sorted(arrays)},
        "meta": dict(meta),
        "sha256": digest,
    }
    path.write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return digest


def content_hash(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and raw values; independent of the compressor's version."""
    digest = hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def text_array(lines: list[str]) -> npt.NDArray[np.uint8]:
    """Lines of text (no line breaks inside) as UTF-8 bytes, uint8 [n]."""
    return np.frombuffer("\n".join(lines).encode(), dtype=np.uint8)


def array_text(array: npt.NDArray[np.uint8]) -> list[str]:
    """The lines that `text_array` packed."""
    return array.tobytes().decode().split("\n")


def _encode(array: npt.NDArray[Any]) -> dict[str, Any]:
    raw = np.ascontiguousarray(array)
    packed = base64.b64encode(zlib.compress(raw.tobytes(), 9)).decode("ascii")
    return {"dtype": raw.dtype.str, "shape": list(raw.shape), "codec": CODEC, "data": packed}


def _decode(entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    if entry["codec"] != CODEC:
        raise ValueError(f"unknown codec {entry['codec']!r}")
    raw = zlib.decompress(base64.b64decode(entry["data"], validate=True))
    return np.frombuffer(raw, dtype=np.dtype(entry["dtype"])).reshape(entry["shape"])
