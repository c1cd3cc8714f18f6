"""The compiled kernels for images of a stack, samples innermost: convolutions and group normalisation."""

from __future__ import annotations

import ctypes
from ctypes import c_long
from functools import lru_cache

import torch
from torch import Tensor

from fedmm import native
from fedmm.native import address, own

Pair = tuple[int, int]


class _Convolution(ctypes.Structure):
    _fields_ = (
        *((n, c_long) for n in ("clients", "batch", "inside", "outside")),
        *((n, c_long * 2) for n in ("size", "kernel", "stride", "padding", "dilation")),
        *((n, c_long) for n in ("pooled", "rectified", "of_weight", "of_bias")),
    )


class _Normalisation(ctypes.Structure):
    _fields_ = (
        *((n, c_long) for n in ("clients", "groups", "channels", "positions", "batch", "rectified")),
        *((n, c_long) for n in ("of_scale", "of_shift")),
        ("eps", ctypes.c_double),
    )


@lru_cache(maxsize=4096)
def _convolution(*numbers: int | Pair) -> _Convolution:
    return _Convolution(*numbers)


@lru_cache(maxsize=4096)
def _normalisation(*numbers: float) -> _Normalisation:
    return _Normalisation(*numbers)


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
    library = native.library
    assert library is not None
    weight, bias = own(weight), None if bias is None else own(bias)
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
        address(bias),
        out.data_ptr(),
        address(which),
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
    library = native.library
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
        address(which),
        address(of_images),
        of_weight.data_ptr(),
        address(of_bias),
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
    library = native.library
    assert library is not None
    scale, shift = (None if t is None else own(t) for t in (scale, shift))
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
        address(scale),
        address(shift),
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
    library = native.library
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
        address(scale),
        address(out),
        gradient.data_ptr(),
        means.data_ptr(),
        scales.data_ptr(),
        address(of_images),
        address(of_scale),
        address(of_shift),
    )
    return of_images, of_scale, of_shift
