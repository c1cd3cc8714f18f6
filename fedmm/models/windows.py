"""How a kernel moves over an image, and its windows without a copy.

An image lies in memory with its margin as [H, C, W, B], samples innermost. Along an output row, what the kernel's
column j meets, in all windows and samples, is then a matrix [h C, W' B] whose rows are evenly apart: im2col
(Chellapilla et al., 2006) would copy each value h w times. With a stride of s the columns lie in s groups, w mod s, so
that those of a matrix follow each other; with dilated rows, each row of the kernel has a matrix [C, W' B] of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from fedmm.models.pooling import Pooling
from fedmm.models.scratch import KEPT, scratch

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image: height and width each.

    Attributes:
        kernel: Taps.
        stride: Steps between outputs.
        padding: Zeros at each side; negative ones cut off.
        dilation: Steps between taps.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def size(self, image: Pair) -> Pair:
        """Height and width of the output."""
        high, wide = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(image, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return high, wide

    def turned(self) -> Geometry:
        """That of the gradient of the input, for strides and dilations of 1."""
        high, wide = (k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True))
        return Geometry(self.kernel, (1, 1), (high, wide), (1, 1))

    @property
    def dense(self) -> bool:
        """Whether strides and dilations are 1."""
        return (*self.stride, *self.dilation) == (1, 1, 1, 1)


class Padded:
    """One image at a time with its margin, which stays zero.

    Args:
        shape: [C, H, W, B] of the images.
        outside: Channels O of the output; 0 if neither `product` nor `correlate` is used.
        dtype: Of the numbers.
        geometry: How the kernel moves.

    Attributes:
        size: Height and width of the output.
        product: Scratch memory for it, [H', O, W', B].
        inside: Where the image is, [H, C, W, B]; None if it does not lie in one piece.
        taps: Shape of a kernel's matrices, transposed: [w, h C, O], or [w h, C, O] if rows are dilated.
    """

    def __init__(self, shape: tuple[int, int, int, int], outside: int, dtype: torch.dtype, geometry: Geometry) -> None:
        channels, high, wide, batch = shape
        (kh, kw), (down, right), (top, left), (gap, step) = (
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
        )
        self.size = geometry.size((high, wide))
        self.product = scratch("product", (self.size[0], outside, self.size[1], batch), dtype)
        each = -(-(wide + 2 * left) // right)
        image = torch.zeros(high + 2 * top, channels, right, each, batch, dtype=dtype)
        rows, of_rows = overlap(-top, 1, len(image), high)
        columns = [overlap(group - left, right, each, wide) for group in range(right)]
        self._places = [image[rows, :, group, at].transpose(0, 1) for group, (at, _) in enumerate(columns)]
        self._parts = [(slice(None), slice(None), of_rows, of) for _, of in columns]
        self.inside = self._places[0].transpose(0, 1) if right == 1 and min(top, left) >= 0 else None
        self._gap = gap
        row, channel = image.stride()[:2]
        self._windows = [
            image.as_strided(
                (self.size[0], channels * (kh if gap == 1 else 1), self.size[1] * batch),
                (down * row, channel, 1),
                i * gap * row + (j * step % right * each + j * step // right) * batch,
            )
            for j in range(kw)
            for i in range(1 if gap == 1 else kh)
        ]
        self.taps = len(self._windows), self._windows[0].shape[1], outside
        self._by_row = scratch("by row", (self.taps[0], self.size[0], *self.taps[1:]), dtype)
        self._each = self._by_row.unbind(0)

    @cached_property
    def pooling(self) -> Pooling:
        """Of the product."""
        return Pooling(self.product)

    @cached_property
    def pooling_inside(self) -> Pooling | None:
        """Of the image, if it lies in one piece."""
        return None if self.inside is None else Pooling(self.inside)

    def parts(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """What `fill` takes, for each of the images [K, C, H, W, B]."""
        return list(zip(*(images[part].unbind(0) for part in self._parts), strict=True))

    def fill(self, parts: tuple[Tensor, ...]) -> None:
        """Take another image."""
        for place, part in zip(self._places, parts, strict=True):
            place.copy_(part)

    def kernels(self, weight: Tensor) -> list[tuple[Tensor, ...]]:
        """What `multiply` takes, for each of the clients' kernels [K, O, C, h, w]."""
        columns = weight.permute(4, 3, 0, 1, 2)  # [w, h, K, O, C]
        matrices = columns.permute(0, 2, 3, 1, 4).flatten(3) if self._gap == 1 else columns.flatten(0, 1)
        each = matrices.contiguous().flatten(0, 1).unsqueeze(1).expand(-1, self.size[0], -1, -1).unbind(0)
        return [each[k :: len(weight)] for k in range(len(weight))]

    def multiply(self, kernels: tuple[Tensor, ...], out: Tensor) -> None:
        """The image's products with a kernel, to [H', O, W' B]."""
        first, *others = zip(kernels, self._windows, strict=True)
        torch.bmm(*first, out=out)
        for kernel, windows in others:
            out.baddbmm_(kernel, windows)

    def correlate(self, product: Tensor, out: Tensor) -> None:
        """Sum over rows, columns and samples of window times product [H', W' B, O], to `taps`."""
        for windows, into in zip(self._windows, self._each, strict=True):
            torch.bmm(windows, product, out=into)
        torch.sum(self._by_row, 1, out=out)


_kept = lru_cache(maxsize=64)(Padded)  # layers, their gradients and the widths of batches: some dozens


def padded(shape: tuple[int, ...], outside: int, dtype: torch.dtype, geometry: Geometry) -> Padded:
    """Memory for images [C, H, W, B] with margins, in turn: steps share the same few, zeros and all."""
    channels, high, wide, batch = shape
    most = max(channels * high * wide, outside * prod(geometry.size((high, wide))))
    kept = most * batch * dtype.itemsize <= KEPT
    return (_kept if kept else Padded)((channels, high, wide, batch), outside, dtype, geometry)


def overlap(offset: int, stride: int, windows: int, size: int) -> tuple[slice, slice]:
    """Windows whose element at `offset` lies inside `size`, and where these elements lie."""
    first = max(0, -(offset // stride))
    last = max(first, min(windows, (size - 1 - offset) // stride + 1))
    start = offset + stride * first
    return slice(first, last), slice(start, max(start, start + stride * (last - first - 1) + 1), stride)
