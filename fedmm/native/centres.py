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


def add_members(features: Tensor, labels: Tensor, present: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Add rows of features to the sums of their classes, and count them; all in one piece.

    Args:
        features: [K, M, B, d].
        labels: int64 [K, B].
        present: bool [K, M, B]: which rows count.
        sums: float64 [K, M, C, d].
        counts: float64 [K, M, C].
    """
    assert native.library is not None
    about = _attraction(*features.shape[:3], *sums.shape[2:], 0, 0)
    native.library.fedmm_class_sums(
        features.dtype is torch.float64,
        ctypes.addressof(about),
        features.data_ptr(),
        labels.data_ptr(),
        present.data_ptr(),
        sums.data_ptr(),
        counts.data_ptr(),
    )


def add_hits(features: Tensor, labels: Tensor, present: Tensor, centres: Tensor, counts: Tensor, hits: Tensor) -> None:
    """Add up rows of features that are nearest to the centre of their own class; all in one piece.

    Args:
        features: [K, M, B, d].
        labels: int64 [K, B].
        present: bool [K, M, B]: which rows count.
        centres: float64 [K, M, C, d].
        counts: float64 [K, M, C]: members of the classes; who has none has no centre.
        hits: float64 [K, M].
    """
    assert native.library is not None
    about = _attraction(*features.shape[:3], *centres.shape[2:], 0, 0)
    native.library.fedmm_hits(
        features.dtype is torch.float64,
        ctypes.addressof(about),
        features.data_ptr(),
        labels.data_ptr(),
        present.data_ptr(),
        centres.data_ptr(),
        counts.data_ptr(),
        hits.data_ptr(),
    )
