"""Convolutions of a stack on a CPU: matrix products over the samples of a client, row by row of the image.

oneDNN's kernels vectorise over channels and want many of them; small networks have eight. Here the samples are
innermost, and products run over W' B. For each output row r of the image and column j of the kernel:

    y_r = b + sum over j of W_j U_rj,   U_rj as [h I, W' B] in place, or one for all j (`fedmm.models.windows`)
    dL/dW_j = sum over r of U_rj dL/dy_r^T
    dL/dx: with stride 1 the same product of dL/dy with the kernel turned round; else W^T dL/dy_r is added up in place

Clients take turns in the same memory, so that an image and what is made of it stay in the processor's cache.
Max-pooling by 2 x 2 and ReLU that follow are done there, too: of values and gradients of full size, none travels to
memory. The bias is added after the pooling: rounding keeps the order, so that the largest value is the same. A client's
bits do not depend on the others, but on the number of rows B of the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmm.models.innermost import samples_innermost
from fedmm.models.scratch import scratch
from fedmm.models.windows import Geometry, Pair, overlap, padded


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    pooled: bool = False,
    rectified: bool = False,
) -> Tensor:
    """Each client's convolution of its own samples, with zero padding.

    Args:
        x: [K, B, I, H, W].
        weight: [K, O, I, h, w].
        bias: [K, O].
        geometry: How the kernel moves.
        pooled: Whether max-pooling by 2 x 2 follows.
        rectified: Whether ReLU follows.

    Returns:
        [K, B, O, H', W'], samples innermost; pooled, half as high and wide.
    """
    return _Convolution.apply(x, weight, bias, geometry, pooled, rectified)  # type: ignore[no-any-return, no-untyped-call]


_threshold = torch.ops.aten.threshold_backward.grad_input
"""_threshold(g, y, 0, grad_input=out): g where y > 0, else 0."""


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, pooled: bool, rectified: bool
    ) -> Tensor:
        """The convolution, and what follows it."""
        x = samples_innermost(x)
        images, clients, outside, batch = x.movedim(1, -1), *weight.shape[:2], x.shape[1]
        image = padded(images.shape[1:], outside, x.dtype, geometry)
        by_row, found = image.product.flatten(2), image.product.transpose(0, 1)
        high, wide = image.pooling.size if pooled else image.size
        y = images.new_empty(clients, outside, high, wide, batch)
        places = images.new_empty(clients, high, outside, wide, batch) if pooled else None
        outputs = y.unbind(0)
        if places is not None:
            largest, chosen = y.transpose(1, 2).unbind(0), places.unbind(0)
        biases = None if bias is None else bias.view(*bias.shape, 1, 1, 1).unbind(0)
        for k, (parts, kernels) in enumerate(zip(image.parts(images), image.kernels(weight), strict=True)):
            out = outputs[k]
            image.fill(parts)
            image.multiply(kernels, by_row)
            if places is not None:
                image.pooling.forward(largest[k], chosen[k])
                if biases is not None:
                    out.add_(biases[k])
            elif biases is not None:
                torch.add(found, biases[k], out=out)
            else:
                out.copy_(found)
            if rectified:
                out.clamp_min_(0)
        result = y.movedim(-1, 1)
        ctx.save_for_backward(x, weight, places, result if rectified else None)
        ctx.biased, ctx.geometry = bias is not None, geometry
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        x, weight, places, y = ctx.saved_tensors
        images, geometry, (clients, outside) = x.movedim(1, -1), ctx.geometry, weight.shape[:2]
        image = padded(images.shape[1:], outside, x.dtype, geometry)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (_OfInput if geometry.dense else _OfStridedInput)(images, weight, geometry, image.size)
        given = of_products = gradient.permute(0, 3, 2, 4, 1)  # [K, H', O, W', B]
        if y is not None:
            outputs = y.permute(0, 3, 2, 4, 1).unbind(0)
            alive = scratch("alive", given.shape[1:], x.dtype)
            of_products = alive.expand_as(given)
        if places is not None:
            chosen = places.unbind(0)
            pooling = image.pooling if of_x is None or of_x.pooling is None else of_x.pooling
            pooling.clear()
            of_products = pooling.image.expand(clients, *pooling.image.shape)
        of_weight, of_bias = weight.new_empty(clients, *image.taps), weight.new_empty(clients, outside)
        each, by_row = of_products.unbind(0), of_products.flatten(3).unbind(0)
        for k, (parts, g) in enumerate(zip(image.parts(images), given.unbind(0), strict=True)):
            if y is not None:
                g = _threshold(g, outputs[k], 0, grad_input=alive)
            if ctx.biased:
                torch.sum(g, (0, 2, 3), out=of_bias[k])
            if places is not None:
                pooling.backward(g, chosen[k])
            image.fill(parts)
            image.correlate(by_row[k], out=of_weight[k])
            if of_x is not None:
                of_x.add(k, each[k])
        return (
            None if of_x is None else of_x.whole.movedim(-1, 1),
            image.of_kernels(of_weight, weight.shape),
            of_bias if ctx.biased else None,
            None,
            None,
            None,
        )


class _OfInput:
    """Gradient of the input, client by client, for strides and dilations of 1: a product with the kernel turned round.

    Attributes:
        whole: [K, I, H, W, B].
        pooling: Of where dL/dy [H', O, W', B] of a client need not be copied from; None: there is no such place.
    """

    def __init__(self, images: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> None:
        clients, channels, high, wide, batch = images.shape
        self._turned = padded((weight.shape[1], *size, batch), 0, images.dtype, geometry.turned())
        self._kernels = self._turned.kernels(weight.flip(3, 4).transpose(1, 2))
        self.pooling = self._turned.pooling_inside
        by_row = images.new_empty(clients, high, channels, wide, batch)
        self.whole, self._each = by_row.transpose(1, 2), by_row.flatten(3).unbind(0)

    def add(self, k: int, g: Tensor) -> None:
        """Of client k, from dL/dy [H', O, W', B]."""
        if self.pooling is None or g.data_ptr() != self.pooling.image.data_ptr():
            self._turned.fill(self._turned.parts(g.transpose(0, 1).unsqueeze(0))[0])
        self._turned.multiply(self._kernels[k], self._each[k])


class _OfStridedInput:
    """The same for other strides and dilations: every window's own gradient is added up where the window was."""

    pooling = None

    def __init__(self, images: Tensor, weight: Tensor, geometry: Geometry, size: Pair) -> None:
        self.whole = torch.empty_like(images)
        self._matrices = weight.permute(0, 1, 3, 4, 2).flatten(2).transpose(1, 2).unbind(0)
        windows = scratch("windows", (*geometry.kernel, images.shape[1], *size, images.shape[-1]), images.dtype)
        self._product = windows.flatten(3).flatten(0, 2)
        spans = [
            [overlap(i * d - p, s, m, n) for i in range(k)]
            for k, d, p, s, m, n in zip(
                geometry.kernel,
                geometry.dilation,
                geometry.padding,
                geometry.stride,
                size,
                images.shape[2:4],
                strict=True,
            )
        ]
        at = [(i, j, *rows, *columns) for i, rows in enumerate(spans[0]) for j, columns in enumerate(spans[1])]
        self._windows = [windows[i, j, :, rows, columns] for i, j, rows, _, columns, _ in at]
        places = [self.whole[:, :, to_rows, to_columns].unbind(0) for _, _, _, to_rows, _, to_columns in at]
        self._places = list(zip(*places, strict=True))

    def add(self, k: int, g: Tensor) -> None:
        """Of client k, from dL/dy [H', O, W', B]."""
        torch.mm(self._matrices[k], g.transpose(0, 1).flatten(1), out=self._product)
        self.whole[k].zero_()
        for place, windows in zip(self._places[k], self._windows, strict=True):
            place.add_(windows)
