"""Sums and products of many small models, compiled: layers of a stack on a processor, and sums over clients.

`kernels.c` is built when the package is installed, wherever there is a C compiler; without it, and for what it has no
rule for (`usable`), PyTorch's operators do the same, more slowly. `FEDMM_KERNELS=off` in the environment does without.

Where a matrix is small, a general library spends its time on preparation, and MKL uses half of the width of processors
that Intel did not make. Values agree with PyTorch's to rounding. A client's bits do not depend on who shares its stack,
but for the gradients of convolutions, which are summed over the whole width of a batch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_FORMATS = (torch.float32, torch.float64)
_VERSION = 2
_MOST_OF_A_LEAF = 8
"""As kernels.c has it: more would write beyond the kernel's memory."""


def _load() -> ctypes.CDLL | None:
    if os.environ.get("FEDMM_KERNELS", "").lower() in ("off", "0"):
        return None
    # Beside this file, or in an installed fedmm while this one is an app that Flower has unpacked.
    places = [Path(__file__).parent, *(Path(entry, "fedmm", "native") for entry in sys.path)]
    found = PathFinder.find_spec("kernels", [str(place) for place in places])
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    if library.fedmm_version() != _VERSION:
        return None
    arguments = {"linear": 5, "linear_back": 8, "convolve": 6, "convolve_back": 8, "normalise": 7, "normalise_back": 10}
    arguments |= {"distances": 5, "pulls": 5, "class_sums": 6, "hits": 7}
    for name, pointers in arguments.items():
        function = getattr(library, f"fedmm_{name}")
        function.argtypes, function.restype = [_INT, *[_POINTER] * pointers], None
    for name in ("cross_entropy", "cross_entropy_back", "soft_cross_entropy"):
        function = getattr(library, f"fedmm_{name}")
        function.argtypes, function.restype = [_INT, _LONG, _LONG, *[_POINTER] * 4], None
    library.fedmm_trees.argtypes, library.fedmm_trees.restype = [_INT, _LONG, _LONG, _LONG, *[_POINTER] * 4], None
    library.fedmm_level.argtypes, library.fedmm_level.restype = [_INT], _INT
    library.fedmm_level(-1)
    return library


library = _load()
"""The compiled kernels; None: there are none."""

INSTRUCTIONS = ("baseline", "AVX2", "AVX-512")


def instructions() -> str | None:
    """Name of the instructions that the kernels use; None: there are no kernels."""
    return None if library is None else INSTRUCTIONS[library.fedmm_level(-1)]


def usable(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels can work with these: all in main memory, in float32 or in float64."""
    dtype = first.dtype
    if library is None or dtype not in _FORMATS or torch.compiler.is_compiling():
        return False
    return first.is_cpu and all(t is None or (t.dtype is dtype and t.is_cpu) for t in others)


class _Dense(ctypes.Structure):
    _fields_ = (
        *((n, _LONG) for n in ("clients", "rows", "inside", "outside")),
        ("x", _LONG * 3),
        *((n, _LONG) for n in ("rectified", "of_weight", "of_bias")),
    )


@lru_cache(maxsize=4096)
def _dense(
    x: tuple[int, ...], outside: int, strides: tuple[int, ...], rectified: bool, weight: int, bias: int
) -> _Dense:
    return _Dense(*x, outside, strides, rectified, weight, bias)


def own(t: Tensor) -> Tensor:
    """Parameters [K, ...] of which each client's lie in one piece; all may be the same one."""
    return t if t.is_contiguous() or t[0].is_contiguous() else t.contiguous()


def address(t: Tensor | None) -> int | None:
    """Where a tensor's numbers begin, for a kernel."""
    return None if t is None else t.data_ptr()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, rectified: bool) -> tuple[Tensor, Tensor]:
    """X W + b of each client, with ReLU behind it if wanted, and the weights as `linear_back` takes them.

    Args:
        x: [K, B, in], with any strides.
        weight: [K, in, out].
        bias: [K, 1, out].
        rectified: Whether ReLU follows.

    Returns:
        [K, B, out].
    """
    assert library is not None
    weight, bias = own(weight), None if bias is None else own(bias)
    clients, rows, _ = shape = x.shape
    outside = weight.shape[2]
    out = x.new_empty(clients, rows, outside)
    apart = 0 if bias is None else bias.stride(0)
    layer = _dense(shape, outside, x.stride(), rectified, weight.stride(0), apart)
    library.fedmm_linear(
        x.dtype is torch.float64,
        ctypes.addressof(layer),
        x.data_ptr(),
        weight.data_ptr(),
        address(bias),
        out.data_ptr(),
    )
    return out, weight


def linear_back(
    x: Tensor, weight: Tensor, out: Tensor | None, gradient: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the input, in its memory's order, of the weights and of the biases, if needed.

    Rows at a client's end whose gradient is zero, as it is for those that fill up a batch, cost nothing.

    Args:
        x: [K, B, in].
        weight: [K, in, out], each client's in one piece.
        out: What `linear` gave, if ReLU was behind it.
        gradient: Of that, [K, B, out].
        needed: Which of the three.
    """
    assert library is not None
    clients, rows, inside = shape = x.shape
    gradient, outside = gradient.contiguous(), weight.shape[2]
    of_x = of_weight = of_bias = into = None
    if needed[0]:
        innermost = x.stride(1) == 1 and rows > 1
        into = x.new_empty(clients, inside, rows) if innermost else x.new_empty(clients, rows, inside)
        of_x = into.transpose(1, 2) if innermost else into
    if needed[1]:
        of_weight = x.new_empty(clients, inside, outside)
    if needed[2]:
        of_bias = x.new_empty(clients, 1, outside)
    layer = _dense(shape, outside, x.stride(), out is not None, weight.stride(0), 0)
    library.fedmm_linear_back(
        x.dtype is torch.float64,
        ctypes.addressof(layer),
        x.data_ptr(),
        weight.data_ptr(),
        address(out),
        gradient.data_ptr(),
        address(into),
        address(of_weight),
        address(of_bias),
    )
    return of_x, of_weight, of_bias


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, and the probabilities, for `cross_entropy_back`.

    Args:
        logits: [..., C], in one piece.
        targets: Labels, int64 [...], or distributions over classes [..., C], in one piece.
    """
    assert library is not None
    find = library.fedmm_soft_cross_entropy if targets.is_floating_point() else library.fedmm_cross_entropy
    losses, probabilities = logits.new_empty(logits.shape[:-1]), torch.empty_like(logits)
    find(
        logits.dtype is torch.float64,
        losses.numel(),
        logits.shape[-1],
        logits.data_ptr(),
        targets.data_ptr(),
        losses.data_ptr(),
        probabilities.data_ptr(),
    )
    return losses, probabilities


def cross_entropy_back(probabilities: Tensor, labels: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the logits [..., C] from that of the losses [...]; all in one piece."""
    assert library is not None
    found = torch.empty_like(probabilities)
    library.fedmm_cross_entropy_back(
        probabilities.dtype is torch.float64,
        labels.numel(),
        probabilities.shape[-1],
        probabilities.data_ptr(),
        labels.data_ptr(),
        gradient.data_ptr(),
        found.data_ptr(),
    )
    return found


def trees(held: Sequence[Sequence[tuple[Sequence[int], Tensor]]], weights: Tensor, leaf: int) -> tuple[Tensor, ...]:
    """Nodes of the tree of `fedmm.trees` above a power of two of places, float64 [numbers] of each of some tensors.

    Args:
        held: Of each tensor, some places, and a row each, [n, numbers], in one piece; all of one type.
        weights: float64, one a place.
        leaf: Places of a leaf, at most 8.
    """
    assert library is not None
    assert leaf <= _MOST_OF_A_LEAF
    rows = np.zeros((len(held), len(weights)), dtype=np.uintp)
    known: dict[int, npt.NDArray[np.intp]] = {}
    for mine, parts in zip(rows, held, strict=True):
        for places, part in parts:
            if id(places) not in known:
                known[id(places)] = np.asarray(places, dtype=np.intp)
            mine[known[id(places)]] = np.arange(len(places)) * (part.stride(0) * part.itemsize) + part.data_ptr()
    numbers = np.array([parts[0][1].shape[1] for parts in held], dtype=np.int_)
    out = weights.new_empty(int(numbers.sum()))
    library.fedmm_trees(
        held[0][0][1].dtype is torch.float64,
        len(held),
        len(weights),
        leaf,
        numbers.ctypes.data,
        rows.ctypes.data,
        weights.data_ptr(),
        out.data_ptr(),
    )
    return torch.split(out, numbers.tolist())
