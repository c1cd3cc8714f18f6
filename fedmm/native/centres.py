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


def _run(kernel: str, features: Tensor, centres: Tensor, *others: Tensor, of_least: int = 0) -> None:
    """Call a kernel with what it is about, features, and the other tensors in its order.

    Args:
        kernel: Its name.
        features: [K, M, B, d], in one piece.
        centres: [K, M, C, d], each client's in one piece; only for its shape and strides.
        others: What else it takes.
        of_least: Numbers of `least` a client apart.
    """
    assert native.library is not None
    about = _attraction(*features.shape[:3], *centres.shape[2:], centres.stride(0), of_least)
    places = [t.data_ptr() for t in (features, *others)]
    getattr(native.library, f"fedmm_{kernel}")(features.dtype is torch.float64, ctypes.addressof(about), *places)


def distances(features: Tensor, centres: Tensor, least: Tensor) -> Tensor:
    """- ||h - C_c|| of each row of features and each centre, [K, M, B, C], and not nearer than allowed.

    Args:
        features: h [K, M, B, d], in one piece.
        centres: C [K, M, C, d].
        least: Least squared distance [K, M, 1, 1].
    """
    centres, least = own(centres), own(least)
    out = features.new_empty(*features.shape[:3], centres.shape[2])
    _run("distances", features, centres, centres, least, out, of_least=least.stride(0))
    return out


def pulls(features: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
    """sum_c r_c (h - C_c) of each row of features, [K, M, B, d].

    Args:
        features: h [K, M, B, d], in one piece.
        centres: C [K, M, C, d].
        factors: r [K, M, B, C], in one piece.
    """
    centres, out = own(centres), torch.empty_like(features)
    _run("pulls", features, centres, centres, factors, out)
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
    _run("class_sums", features, sums, labels, present, sums, counts)


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
    _run("hits", features, centres, labels, present, centres, counts, hits)
