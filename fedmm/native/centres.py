"""The compiled kernels for distances of features to the centres of classes, in a stack."""

from __future__ import annotations

import ctypes
from ctypes import c_long
from functools import lru_cache

import torch
from torch import Tensor

from fedmm import native
from fedmm.native import own


class _Attraction(ctypes.Structure):
    _fields_ = tuple(
        (n, c_long) for n in ("clients", "modalities", "rows", "classes", "width", "of_centres", "of_least")
    )


@lru_cache(maxsize=4096)
def _attraction(*numbers: int) -> _Attraction:
    return _Attraction(*numbers)


def distances(features: Tensor, centres: Tensor, least: Tensor) -> Tensor:
    """- ||h - C_c|| of each row of features and each centre, [K, M, B, C], and not nearer than allowed.

    Args:
        features: h [K, M, B, d], in one piece.
        centres: C [K, M, C, d].
        least: Least squared distance [K, M, 1, 1].
    """
    assert native.library is not None
    clients, modalities, rows, width = features.shape
    centres, least = own(centres), own(least)
    classes = centres.shape[2]
    out = features.new_empty(clients, modalities, rows, classes)
    about = _attraction(clients, modalities, rows, classes, width, centres.stride(0), least.stride(0))
    native.library.fedmm_distances(
        features.dtype is torch.float64,
        ctypes.addressof(about),
        features.data_ptr(),
        centres.data_ptr(),
        least.data_ptr(),
        out.data_ptr(),
    )
    return out


def pulls(features: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
    """sum_c r_c (h - C_c) of each row of features, [K, M, B, d].

    Args:
        features: h [K, M, B, d], in one piece.
        centres: C [K, M, C, d].
        factors: r [K, M, B, C], in one piece.
    """
    assert native.library is not None
    centres, out = own(centres), torch.empty_like(features)
    about = _attraction(*features.shape[:3], *centres.shape[2:], centres.stride(0), 0)
    native.library.fedmm_pulls(
        features.dtype is torch.float64,
        ctypes.addressof(about),
        features.data_ptr(),
        centres.data_ptr(),
        factors.data_ptr(),
        out.data_ptr(),
    )
    return out
