"""Convolutions of a stack on a CPU: matrix products over the samples of a client, row by row of the image.

oneDNN's kernels vectorise over channels and want many of them; small networks have eight. Here the samples are
innermost: activations of shape [K, B, C, H, W] lie in memory as [K, C, H, W, B], and products run over W' B. Of the
padded input, R [H + 2p, w, I, W' B] holds every row once for each column of the kernel, shifted; the windows of an
output row are h of its rows on end, so that they need no copy (im2col, Chellapilla et al., 2006, copies h w times):

    y_r = W U_r + b,   U_r = R[r s : r s + h] as [h w I, W' B];   dL/dW = sum over r of U_r dL/dy_r^T
    dL/dx: with stride 1 the same product of dL/dy with the kernel turned round; else W^T dL/dy_r is added up in place

Clients take turns, so that R stays in the processor's cache; the backward pass forms it again, which is quicker than
to fetch it from memory. A client's bits do not depend on the others, but on the number of rows B of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pair = tuple[int, int]

_KEPT = 2**21
"""Bytes up to which the rows of an image stay allocated: what a processor's second cache holds."""


def samples_innermost(x: Tensor) -> Tensor:
    """The same tensor [K, B, C, ...] with its memory as [K, C, ..., B]; free if it is so already."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


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


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Each client's convolution of its own samples, with zero padding.

    Args:
        x: [K, B, I, H, W].
        weight: [K, O, I, h, w].
        bias: [K, O].
        geometry: How the kernel moves.

    Returns:
        [K, B, O, H', W'], samples innermost.
    """
    return _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-any-return, no-untyped-call]


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Group normalisation of each sample (Wu and He, 2018), with each client's scale and shift.

    Args:
        x: [K, B, C, H, W].
        weight: [K, C].
        bias: [K, C].
        groups: Of channels.
        eps: Added to the variance.

    Returns:
        The shape of x, samples innermost.
    """
    return _GroupNorm.apply(x, weight, bias, groups, eps)  # type: ignore[no-any-return, no-untyped-call]


def flat_samples(x: Tensor) -> Tensor:
    """[K, B, C, ...] with samples innermost -> [K, B, F], a view, whose gradient gets samples innermost again."""
    return _FlatSamples.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _FlatSamples(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The samples in one row each."""
        ctx.shape = x.shape
        return samples_innermost(x).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient in the input's shape."""
        return samples_innermost(gradient).movedim(1, -1).view(*ctx.shape[:1], *ctx.shape[2:], -1).movedim(-1, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The convolution."""
        x = samples_innermost(x)
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.geometry = bias is not None, geometry
        return _convolve(x.movedim(1, -1), _product_order(weight), bias, geometry).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        images, g, geometry = x.movedim(1, -1), gradient.movedim(1, -1).contiguous(), ctx.geometry
        of_weight = _of_weight(images, g, geometry) if ctx.needs_input_grad[1] else None
        of_x = None
        if ctx.needs_input_grad[0] and geometry.dense:
            turned = _product_order(weight.flip(3, 4).transpose(1, 2))
            of_x = _convolve(g, turned, None, geometry.turned())
        elif ctx.needs_input_grad[0]:
            of_x = _of_input(images.shape, g, _product_order(weight), geometry)
        return (
            None if of_x is None else of_x.movedim(-1, 1),
            of_weight,
            g.flatten(2).sum(2) if ctx.biased else None,
            None,
        )


class _GroupNorm(torch.autograd.Function):
    """In one pass over the positions for each sum.

    t = x - m;  1 / r^2 = mean of t^2 over the n values of a group, plus eps;  y = r w t + b
    P = sum of dL/dy, Q = sum of t dL/dy over the positions of a channel;  dL/dw = sum of r Q;  dL/db = sum of P
    dL/dx = r w dL/dy - r (sum of w P) / n - r^3 t (sum of w Q) / n, sums over the channels of the group
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        """The normalised samples."""
        x = samples_innermost(x)
        images = x.movedim(1, -1).flatten(2, -2)
        clients, channels, _, batch = images.shape
        y, buffer = torch.empty_like(images), images.new_empty(groups, images[0].numel() // groups // batch, batch)
        mean, scale = images.new_empty(2, clients, groups, 1, batch)
        for k, group in enumerate(images.view(clients, *buffer.shape).unbind(0)):
            torch.mean(group, 1, keepdim=True, out=mean[k])
            torch.sub(group, mean[k], out=buffer)
            torch.mean(buffer.square_(), 1, keepdim=True, out=scale[k])
        scale.add_(eps).rsqrt_()
        factor = scale.repeat_interleave(channels // groups, 1)
        if weight is not None:
            factor = factor * weight[:, :, None, None]
        shift = -factor * mean.repeat_interleave(channels // groups, 1)
        if bias is not None:
            shift += bias[:, :, None, None]
        for k, image in enumerate(images.unbind(0)):
            torch.addcmul(shift[k], image, factor[k], out=y[k])
        ctx.save_for_backward(x, weight, mean, scale, factor)
        return y.view(x.movedim(1, -1).shape).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight, mean, scale, factor = ctx.saved_tensors
        images, g = x.movedim(1, -1).flatten(2, -2), gradient.movedim(1, -1).contiguous().flatten(2, -2)
        clients, channels, positions, batch = images.shape
        each = channels // mean.shape[1]
        found, buffer = torch.empty_like(images), torch.empty_like(images[0])
        p, q = sums = images.new_empty(2, clients, channels, 1, batch)
        means = mean.repeat_interleave(each, 1)
        for k, (image, part) in enumerate(zip(images.unbind(0), g.unbind(0), strict=True)):
            torch.sum(part, 1, keepdim=True, out=p[k])
            torch.sub(image, means[k], out=buffer)
            torch.sum(buffer.mul_(part), 1, keepdim=True, out=q[k])
        weighted = sums if weight is None else sums * weight[:, :, None, None]
        of_p, of_q = weighted.view(2, clients, -1, each, 1, batch).sum(3) / (each * positions)
        of_t = (-(scale**3) * of_q).repeat_interleave(each, 1)
        of_one = (-scale * of_p).repeat_interleave(each, 1) - of_t * means
        for k, (image, part) in enumerate(zip(images.unbind(0), g.unbind(0), strict=True)):
            torch.addcmul(of_one[k], image, of_t[k], out=found[k])
            found[k].addcmul_(part, factor[k])
        return (
            found.view(x.movedim(1, -1).shape).movedim(-1, 1),
            (q * scale.repeat_interleave(each, 1)).sum((2, 3)) if ctx.needs_input_grad[1] else None,
            p.sum((2, 3)) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _product_order(weight: Tensor) -> Tensor:
    """[K, O, I, h, w] -> [K, O, h w I], as rows of the image lie."""
    return weight.permute(0, 1, 3, 4, 2).flatten(2)


def _convolve(images: Tensor, kernels: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[K, I, H, W, B] and [K, O, h w I] -> [K, O, H', W', B]."""
    rows = _rows(tuple(images.shape[1:]), images.dtype, geometry)
    high, wide = rows.size
    y = images.new_empty(*kernels.shape[:2], high, wide, images.shape[-1])
    each = kernels.unsqueeze(1).expand(-1, high, -1, -1).unbind(0)
    by_row = y.flatten(3).transpose(1, 2).unbind(0)
    added = None if bias is None else bias.unsqueeze(2).unbind(0)
    for k, image in enumerate(images.unbind(0)):
        torch.bmm(each[k], rows.fill(image), out=by_row[k])
        if added is not None:
            by_row[k].add_(added[k])
    return y


def _of_weight(images: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of the weight [K, O, I, h, w] from [K, I, H, W, B] and that of the output [K, O, H', W', B]."""
    rows = _rows(tuple(images.shape[1:]), images.dtype, geometry)
    by_row = g.flatten(3).permute(0, 2, 3, 1).unbind(0)
    found = torch.stack([torch.bmm(rows.fill(image), by_row[k]).sum(0) for k, image in enumerate(images.unbind(0))])
    return found.view(len(found), *geometry.kernel, images.shape[1], g.shape[1]).permute(0, 4, 3, 1, 2).contiguous()


def _of_input(shape: torch.Size, g: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of images of `shape` [K, I, H, W, B]: every window's own, added up where the window was."""
    found = g.new_zeros(shape)
    _, channels, *image, batch = shape
    high, wide = g.shape[2:4]
    spans = [
        [_overlap(i * d - p, s, m, n) for i in range(k)]
        for k, d, p, s, m, n in zip(
            geometry.kernel, geometry.dilation, geometry.padding, geometry.stride, (high, wide), image, strict=True
        )
    ]
    for kernel, part, into in zip(kernels, g, found, strict=True):
        windows = torch.mm(kernel.T, part.flatten(1)).view(*geometry.kernel, channels, high, wide, batch)
        for i, (rows, to_rows) in enumerate(spans[0]):
            for j, (columns, to_columns) in enumerate(spans[1]):
                into[:, to_rows, to_columns] += windows[i, j, :, rows, columns]
    return found


class _Rows:
    """The rows R of one image at a time; what lies outside the image stays zero.

    Attributes:
        size: Height and width of the output.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, geometry: Geometry) -> None:
        channels, high, wide, batch = shape
        self.size = geometry.size((high, wide))
        (kh, kw), (down, right), (top, left), (gap, step) = (
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
        )
        columns = [_overlap(j * step - left, right, self.size[1], wide) for j in range(kw)]
        if gap == 1:
            # A window's rows follow each other: each is held once.
            held = down * (self.size[0] - 1) + kh
            rows, apart = torch.zeros(held, kw, channels, self.size[1], batch, dtype=dtype), down
            inside = [(rows, *_overlap(-top, 1, held, high))]
        else:
            held, apart = self.size[0] * kh, kh
            rows = torch.zeros(held, kw, channels, self.size[1], batch, dtype=dtype)
            inside = [(rows[i::kh], *_overlap(i * gap - top, down, self.size[0], high)) for i in range(kh)]
        self._copies = [
            (held_rows[at_rows, j, :, at].transpose(0, 1), (slice(None), of_rows, of))
            for held_rows, at_rows, of_rows in inside
            for j, (at, of) in enumerate(columns)
        ]
        row = rows.stride(0)
        self._windows = rows.as_strided(
            (self.size[0], kh * kw * channels, self.size[1] * batch), (apart * row, self.size[1] * batch, 1)
        )

    def fill(self, image: Tensor) -> Tensor:
        """The windows of each output row [H', h w I, W' B] of an image [I, H, W, B]."""
        for into, where in self._copies:
            into.copy_(image[where])
        return self._windows


_kept_rows = lru_cache(maxsize=64)(_Rows)


def _rows(shape: tuple[int, ...], dtype: torch.dtype, geometry: Geometry) -> _Rows:
    """Where images [I, H, W, B] are to be unrolled: steps take turns in the same few, zeros and all."""
    channels, high, wide, batch = shape
    small = channels * high * wide * batch * geometry.kernel[1] * dtype.itemsize <= _KEPT
    return (_kept_rows if small else _Rows)((channels, high, wide, batch), dtype, geometry)


def _overlap(offset: int, stride: int, windows: int, size: int) -> tuple[slice, slice]:
    """Windows whose element at `offset` lies inside `size`, and where these elements lie."""
    first = max(0, -(offset // stride))
    last = max(first, min(windows, (size - 1 - offset) // stride + 1))
    start = offset + stride * first
    return slice(first, last), slice(start, max(start, start + stride * (last - first - 1) + 1), stride)
