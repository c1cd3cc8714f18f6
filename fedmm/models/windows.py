"""How a kernel moves over an image, and its windows.

An image lies in memory with its margin, samples innermost, as [H, C, W, B] or, once for each of the kernel's w columns,
as [H, C, w, W', B]: copy j holds what column j meets in each window, whatever stride and dilation. Then along an output
row all windows and samples are one matrix whose rows are evenly apart, without a further copy (im2col, Chellapilla et
al., 2006, would copy each value h w times):

    copies:   [h C w, W' B]
    in place: [h C, W' B] for each column of the kernel, one sample further each

Of one channel, products of h rows each would mostly write and read their sum, so there are copies; from two on, filling
and reading them costs as much as it saves. They also serve all strides and dilations. With dilated rows, each row of
the kernel has a matrix of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fedmm.models.pooling import Pooling
from fedmm.models.scratch import KEPT, scratch

Pair = tuple[int, int]

VECTOR = 16
"""Numbers in a register (float32): fewer channels of the output are better a product's rows than its columns."""


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


def columns_copied(channels: int, geometry: Geometry) -> bool:
    """Whether an image lies there once for each of the kernel's columns."""
    return channels == 1 or not geometry.dense


class Padded:
    """One image at a time with its margin, which stays zero.

    Args:
        shape: [C, H, W, B] of the images.
        outside: Channels O of the output.
        dtype: Of the numbers.
        geometry: How the kernel moves.

    Attributes:
        size: Height and width of the output.
        inside: Where the image is, [H, C, W, B]; None if it does not lie in one piece.
        taps: Shape of what `correlate` finds: [M, O, N], or [M, N, O], for M matrices of N rows.
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
        self._dtype, self._shapes = dtype, ((high, channels, wide, batch), (self.size[0], outside, self.size[1], batch))
        copied = columns_copied(channels, geometry)
        copies, each = (kw, self.size[1]) if copied else (1, wide + 2 * left)
        image = torch.zeros(high + 2 * top, channels, copies, each, batch, dtype=dtype)
        at_rows, rows = overlap(-top, 1, len(image), high)
        columns = [overlap(j * step - left, right, each, wide) for j in range(copies)]
        self._places = [image[at_rows, :, j, at].transpose(0, 1) for j, (at, _) in enumerate(columns)]
        self._parts = [(slice(None), slice(None), rows, of) for _, of in columns]
        self.inside = None if copied or min(top, left) < 0 else self._places[0].transpose(0, 1)
        self._apart = 1 if gap == 1 else kh, kw // copies
        row, _, column = image.stride()[:3]
        self._windows = [
            image.as_strided(
                (self.size[0], kh // self._apart[0] * channels * copies, self.size[1] * batch),
                (down * row, column, 1),
                i * gap * row + j * batch,
            )
            for i in range(self._apart[0])
            for j in range(self._apart[1])
        ]
        self._turned = [windows.transpose(1, 2) for windows in self._windows] if outside < VECTOR else None
        count, taps = len(self._windows), self._windows[0].shape[1]
        self.taps = (count, taps, outside) if self._turned is None else (count, outside, taps)
        self._by_row = scratch("by row", (count, self.size[0], *self.taps[1:]), dtype)
        self._each = self._by_row.unbind(0)

    @cached_property
    def product(self) -> Tensor:
        """Scratch memory for it, [H', O, W', B]."""
        return scratch("product", self._shapes[1], self._dtype)

    @cached_property
    def pooling(self) -> Pooling:
        """Of the product."""
        return Pooling(self.product)

    @cached_property
    def pooling_inside(self) -> Pooling:
        """Of the image or, if that does not lie in one piece, of memory to fill it from."""
        return Pooling(scratch("product", self._shapes[0], self._dtype) if self.inside is None else self.inside)

    def parts(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """What `fill` takes, for each of the images [K, C, H, W, B]."""
        return list(zip(*(images[part].unbind(0) for part in self._parts), strict=True))

    def fill(self, parts: tuple[Tensor, ...]) -> None:
        """Take another image."""
        for place, part in zip(self._places, parts, strict=True):
            place.copy_(part)

    def kernels(self, weight: Tensor) -> list[tuple[Tensor, ...]]:
        """What `multiply` takes, for each of the clients' kernels [K, O, C, h, w]."""
        clients, outside, channels, high, wide = weight.shape
        rows, columns = self._apart
        split = weight.view(clients, outside, channels, rows, high // rows, columns, wide // columns)
        matrices = split.permute(3, 5, 0, 1, 4, 2, 6).reshape(rows * columns * clients, 1, outside, -1).contiguous()
        each = matrices.expand(-1, self.size[0], -1, -1).unbind(0)
        return [each[k::clients] for k in range(clients)]

    def of_kernels(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The gradient, of a shape [K, O, C, h, w], from what `correlate` found for each client, [K, *taps]."""
        clients, outside, channels, high, wide = shape
        rows, columns = self._apart
        matrices = found.transpose(2, 3) if self._turned is None else found
        split = matrices.view(clients, rows, columns, outside, high // rows, channels, wide // columns)
        return split.permute(0, 3, 5, 1, 4, 2, 6).flatten(5).flatten(3, 4)

    def multiply(self, kernels: tuple[Tensor, ...], out: Tensor) -> None:
        """The image's products with a kernel, to [H', O, W' B]."""
        first, *others = zip(kernels, self._windows, strict=True)
        torch.bmm(*first, out=out)
        for kernel, windows in others:
            out.baddbmm_(kernel, windows)

    def correlate(self, product: Tensor, out: Tensor) -> None:
        """Sum over rows, columns and samples of window times product [H', O, W' B], to `taps`."""
        if self._turned is None:
            product = product.transpose(1, 2)
            for windows, into in zip(self._windows, self._each, strict=True):
                torch.bmm(windows, product, out=into)
        else:
            for windows, into in zip(self._turned, self._each, strict=True):
                torch.bmm(product, windows, out=into)
        torch.sum(self._by_row, 1, out=out)


_kept = lru_cache(maxsize=64)(Padded)  # layers, their gradients and the widths of batches: some dozens


def padded(shape: tuple[int, ...], outside: int, dtype: torch.dtype, geometry: Geometry) -> Padded:
    """Memory for images [C, H, W, B] with margins, in turn: steps share the same few, zeros and all."""
    channels, high, wide, batch = shape
    rows, columns = geometry.size((high, wide))
    each = geometry.kernel[1] * columns if columns_copied(channels, geometry) else wide
    kept = max(channels * high * each, outside * rows * columns) * batch * dtype.itemsize <= KEPT
    return (_kept if kept else Padded)((channels, high, wide, batch), outside, dtype, geometry)


def overlap(offset: int, stride: int, windows: int, size: int) -> tuple[slice, slice]:
    """Windows whose element at `offset` lies inside `size`, and where these elements lie."""
    first = max(0, -(offset // stride))
    last = max(first, min(windows, (size - 1 - offset) // stride + 1))
    start = offset + stride * first
    return slice(first, last), slice(start, max(start, start + stride * (last - first - 1) + 1), stride)
