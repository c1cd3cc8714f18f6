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
import torch
from torch import Tensor

Pair = tuple[int, int]

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_FORMATS = (torch.float32, torch.float64)
_VERSION = 1


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
    for name, pointers in arguments.items():
        function = getattr(library, f"fedmm_{name}")
        function.argtypes, function.restype = [_INT, *[_POINTER] * pointers], None
    for name in ("cross_entropy", "cross_entropy_back"):
        function = getattr(library, f"fedmm_{name}")
        function.argtypes, function.restype = [_INT, _LONG, _LONG, *[_POINTER] * 4], None
    library.fedmm_tree.argtypes, library.fedmm_tree.restype = [_INT, _LONG, _LONG, _LONG, *[_POINTER] * 3], None
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


class _Convolution(ctypes.Structure):
    _fields_ = (
        *((n, _LONG) for n in ("clients", "batch", "inside", "outside")),
        *((n, _LONG * 2) for n in ("size", "kernel", "stride", "padding", "dilation")),
        *((n, _LONG) for n in ("pooled", "rectified", "of_weight", "of_bias")),
    )


class _Normalisation(ctypes.Structure):
    _fields_ = (
        *((n, _LONG) for n in ("clients", "groups", "channels", "positions", "batch", "rectified")),
        *((n, _LONG) for n in ("of_scale", "of_shift")),
        ("eps", ctypes.c_double),
    )


@lru_cache(maxsize=4096)
def _dense(
    x: tuple[int, ...], outside: int, strides: tuple[int, ...], rectified: bool, weight: int, bias: int
) -> _Dense:
    return _Dense(*x, outside, strides, rectified, weight, bias)


@lru_cache(maxsize=4096)
def _convolution(*numbers: int | Pair) -> _Convolution:
    return _Convolution(*numbers)


@lru_cache(maxsize=4096)
def _normalisation(*numbers: float) -> _Normalisation:
    return _Normalisation(*numbers)


def _own(t: Tensor) -> Tensor:
    """Parameters [K, ...] of which each client's lie in one piece; all may be the same one."""
    return t if t.is_contiguous() or t[0].is_contiguous() else t.contiguous()


def _at(t: Tensor | None) -> int | None:
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
    weight, bias = _own(weight), None if bias is None else _own(bias)
    clients, rows, _ = shape = x.shape
    outside = weight.shape[2]
    out = x.new_empty(clients, rows, outside)
    apart = 0 if bias is None else bias.stride(0)
    layer = _dense(shape, outside, x.stride(), rectified, weight.stride(0), apart)
    library.fedmm_linear(
        x.dtype is torch.float64, ctypes.addressof(layer), x.data_ptr(), weight.data_ptr(), _at(bias), out.data_ptr()
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
        _at(out),
        gradient.data_ptr(),
        _at(into),
        _at(of_weight),
        _at(of_bias),
    )
    return of_x, of_weight, of_bias


def convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    moves: tuple[Pair, Pair, Pair],
    size: Pair,
    pooled: bool,
    rectified: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Each client's convolution, if wanted with max-pooling by 2 x 2 and ReLU behind it.

    Args:
        images: [K, I, H, W, B], in one piece.
        weight: [K, O, I, h, w].
        bias: [K, O].
        moves: Strides, padding, dilation.
        size: Height and width of what it gives.
        pooled: Whether pooling follows.
        rectified: Whether ReLU follows.

    Returns:
        [K, O, *size, B]; of the same shape which of four places each value comes from, if pooled, or that ReLU stopped
        it, for `convolve_back`; the weights as that takes them.
    """
    assert library is not None
    weight, bias = _own(weight), None if bias is None else _own(bias)
    clients, inside, high, wide, batch = images.shape
    out = images.new_empty(clients, weight.shape[1], *size, batch)
    which = images.new_empty(out.shape, dtype=torch.uint8) if pooled or rectified else None
    layer = _convolution(
        clients,
        batch,
        inside,
        weight.shape[1],
        (high, wide),
        (weight.shape[3], weight.shape[4]),
        *moves,
        int(pooled),
        int(rectified),
        weight.stride(0),
        0 if bias is None else bias.stride(0),
    )
    library.fedmm_convolve(
        images.dtype is torch.float64,
        ctypes.addressof(layer),
        images.data_ptr(),
        weight.data_ptr(),
        _at(bias),
        out.data_ptr(),
        _at(which),
    )
    return out, which, weight


def convolve_back(
    images: Tensor,
    weight: Tensor,
    gradient: Tensor,
    which: Tensor | None,
    moves: tuple[Pair, Pair, Pair],
    pooled: bool,
    rectified: bool,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of the images and of the biases, if needed, and of the weights.

    Args:
        images: [K, I, H, W, B], in one piece.
        weight: [K, O, I, h, w], each client's in one piece.
        gradient: Of what `convolve` gave, [K, O, *size, B], in one piece.
        which: Of `convolve`.
        moves: Strides, padding, dilation.
        pooled: As for `convolve`.
        rectified: As for `convolve`.
        needed: Whether those of the images and of the biases are.
    """
    assert library is not None
    clients, inside, high, wide, batch = images.shape
    outside, kernel = weight.shape[1], (weight.shape[3], weight.shape[4])
    of_images = torch.empty_like(images) if needed[0] else None
    of_weight = images.new_empty(weight.shape)
    of_bias = images.new_empty(clients, outside) if needed[1] else None
    layer = _convolution(
        clients, batch, inside, outside, (high, wide), kernel, *moves, int(pooled), int(rectified), weight.stride(0), 0
    )
    library.fedmm_convolve_back(
        images.dtype is torch.float64,
        ctypes.addressof(layer),
        images.data_ptr(),
        weight.data_ptr(),
        gradient.data_ptr(),
        _at(which),
        _at(of_images),
        of_weight.data_ptr(),
        _at(of_bias),
    )
    return of_images, of_weight, of_bias


def normalise(
    images: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, eps: float, rectified: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Group normalisation of each sample, with ReLU behind it if wanted.

    Args:
        images: [K, C, ..., B], in one piece.
        scale: Each client's factors [K, C].
        shift: And what is added [K, C].
        groups: Of channels.
        eps: Added to the variance.
        rectified: Whether ReLU follows.

    Returns:
        The normalised values; means and inverse deviations [K, groups, B], and the factors, for `normalise_back`.
    """
    assert library is not None
    scale, shift = (None if t is None else _own(t) for t in (scale, shift))
    clients, channels, batch = images.shape[0], images.shape[1], images.shape[-1]
    out, means = torch.empty_like(images), images.new_empty(clients, groups, batch)
    scales = torch.empty_like(means)
    layer = _normalisation(
        clients,
        groups,
        channels,
        images[0, 0, ..., 0].numel(),
        batch,
        int(rectified),
        0 if scale is None else scale.stride(0),
        0 if shift is None else shift.stride(0),
        eps,
    )
    library.fedmm_normalise(
        images.dtype is torch.float64,
        ctypes.addressof(layer),
        images.data_ptr(),
        _at(scale),
        _at(shift),
        out.data_ptr(),
        means.data_ptr(),
        scales.data_ptr(),
    )
    return out, means, scales, scale


def normalise_back(
    images: Tensor,
    scale: Tensor | None,
    out: Tensor | None,
    gradient: Tensor,
    means: Tensor,
    scales: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the images, the factors and what is added, if needed.

    Args:
        images: [K, C, ..., B], in one piece.
        scale: As `normalise` gave it.
        out: What `normalise` gave, if ReLU was behind it.
        gradient: Of that, in one piece.
        means: Of `normalise`.
        scales: Of `normalise`.
        needed: Which of the three.
    """
    assert library is not None
    clients, channels, batch = images.shape[0], images.shape[1], images.shape[-1]
    of_images = torch.empty_like(images) if needed[0] else None
    of_scale, of_shift = (images.new_empty(clients, channels) if wanted else None for wanted in needed[1:])
    layer = _normalisation(
        clients,
        means.shape[1],
        channels,
        images[0, 0, ..., 0].numel(),
        batch,
        int(out is not None),
        0 if scale is None else scale.stride(0),
        0,
        0.0,
    )
    library.fedmm_normalise_back(
        images.dtype is torch.float64,
        ctypes.addressof(layer),
        images.data_ptr(),
        _at(scale),
        _at(out),
        gradient.data_ptr(),
        means.data_ptr(),
        scales.data_ptr(),
        _at(of_images),
        _at(of_scale),
        _at(of_shift),
    )
    return of_images, of_scale, of_shift


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, and the probabilities, for `cross_entropy_back`.

    Args:
        logits: [..., C], in one piece.
        labels: int64 [...], in one piece.
    """
    assert library is not None
    losses, probabilities = logits.new_empty(labels.shape), torch.empty_like(logits)
    library.fedmm_cross_entropy(
        logits.dtype is torch.float64,
        labels.numel(),
        logits.shape[-1],
        logits.data_ptr(),
        labels.data_ptr(),
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


def tree(held: Sequence[tuple[Sequence[int], Tensor]], weights: Tensor, leaf: int) -> Tensor:
    """Node of the tree of `fedmm.trees` above a power of two of places: float64 [numbers].

    Args:
        held: Some places, and a row each, [n, numbers], in one piece; all of one type.
        weights: float64, one a place.
        leaf: Places of a leaf.
    """
    assert library is not None
    first = held[0][1]
    out = first.new_empty(first.shape[1], dtype=torch.float64)
    at = np.zeros(len(weights), dtype=np.uintp)
    for places, rows in held:
        at[list(places)] = rows.data_ptr() + np.arange(len(places)) * (rows.stride(0) * rows.itemsize)
    library.fedmm_tree(
        first.dtype is torch.float64,
        len(weights),
        leaf,
        first.shape[1],
        at.ctypes.data,
        weights.data_ptr(),
        out.data_ptr(),
    )
    return out
