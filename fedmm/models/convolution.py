"""Convolutions of a stack on a CPU: matrix products over the samples of a client, row by row of the image.

oneDNN's kernels vectorise over channels and want many of them; small networks have eight. Here the samples are
innermost, and products run over W' B. For each output row r of the image and column j of the kernel:

    y_r = b + sum over j of W_j U_rj,   U_rj as [h I, W' B] in place, or one for all j (`fedmm.models.windows`)
    dL/dW_j = sum over r of U_rj dL/dy_r^T
    dL/dx: W^T dL/dy_r, added up in place

With stride 1, where dL/dx is needed, both come from the windows V_rj of dL/dy and the kernel turned round, T:

    dL/dx_r = sum over j of T_j V_rj;   dL/dT_j = sum over r of V_rj x_r^T

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
from fedmm.models.pooling import Pooling
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
        clients, outside = weight.shape[:2]
        given = of_products = gradient.permute(0, 3, 2, 4, 1)  # [K, H', O, W', B]
        if ctx.needs_input_grad[0] and ctx.geometry.dense:
            gradients: _FromProducts | _FromImages = _FromProducts(x.movedim(1, -1), weight, ctx.geometry)
        else:
            gradients = _FromImages(x.movedim(1, -1), weight, ctx.geometry, ctx.needs_input_grad[0])
        if y is not None:
            outputs = y.permute(0, 3, 2, 4, 1).unbind(0)
            alive = scratch("alive", given.shape[1:], x.dtype)
            of_products = alive.expand_as(given)
        if places is not None:
            chosen, pooling = places.unbind(0), gradients.pooling
            pooling.clear()
            of_products = pooling.image.expand(clients, *pooling.image.shape)
        of_bias = weight.new_empty(clients, outside)
        for k, (g, of_product) in enumerate(zip(given.unbind(0), of_products.unbind(0), strict=True)):
            if y is not None:
                g = _threshold(g, outputs[k], 0, grad_input=alive)
            if ctx.biased:
                torch.sum(g, (0, 2, 3), out=of_bias[k])
            if places is not None:
                pooling.backward(g, chosen[k])
            gradients.add(k, of_product)
        return gradients.of_x, gradients.of_weight, of_bias if ctx.biased else None, None, None, None


class _FromProducts:
    """Gradients of input and weight, client by client, for strides and dilations of 1: from windows of dL/dy.

    dL/dx is their product with the kernel turned round, dL/dW, turned round, their sum of products with x in place.
    """

    def __init__(self, images: Tensor, weight: Tensor, geometry: Geometry) -> None:
        clients, channels, high, wide, batch = images.shape
        shape = weight.shape[1], *geometry.size((high, wide)), batch
        self._windows = padded(shape, channels, images.dtype, geometry.turned())
        turned = weight.flip(3, 4).transpose(1, 2)
        self._kernels, self._turned = self._windows.kernels(turned), turned.shape
        self._images = images.transpose(1, 2).flatten(3).unbind(0)
        by_row = images.new_empty(clients, high, channels, wide, batch)
        self._whole, self._of_images = by_row.transpose(1, 2), by_row.flatten(3).unbind(0)
        self._found = images.new_empty(clients, *self._windows.taps)

    @property
    def pooling(self) -> Pooling:
        """Where `add` takes dL/dy from."""
        return self._windows.pooling_inside

    def add(self, k: int, g: Tensor) -> None:
        """Of client k, from dL/dy [H', O, W', B]."""
        inside = self._windows.inside
        if inside is None or g.data_ptr() != inside.data_ptr():
            self._windows.fill(self._windows.parts(g.transpose(0, 1).unsqueeze(0))[0])
        self._windows.multiply(self._kernels[k], self._of_images[k])
        self._windows.correlate(self._images[k], out=self._found[k])

    @property
    def of_x(self) -> Tensor:
        """[K, B, I, H, W], samples innermost."""
        return self._whole.movedim(-1, 1)

    @property
    def of_weight(self) -> Tensor:
        """[K, O, I, h, w]."""
        return self._windows.of_kernels(self._found, self._turned).flip(3, 4).transpose(1, 2).contiguous()


class _FromImages:
    """The same from windows of x, for whatever geometry; that of the input only if it is needed."""

    def __init__(self, images: Tensor, weight: Tensor, geometry: Geometry, of_x: bool) -> None:
        self._image = padded(images.shape[1:], weight.shape[1], images.dtype, geometry)
        self._parts, self._shape = self._image.parts(images), weight.shape
        self._found = images.new_empty(len(weight), *self._image.taps)
        self._of_x = _OfStridedInput(images, weight, geometry, self._image.size) if of_x else None

    @property
    def pooling(self) -> Pooling:
        """Where `add` takes dL/dy from."""
        return self._image.pooling

    def add(self, k: int, g: Tensor) -> None:
        """Of client k, from dL/dy [H', O, W', B]."""
        self._image.fill(self._parts[k])
        self._image.correlate(g.flatten(2), out=self._found[k])
        if self._of_x is not None:
            self._of_x.add(k, g)

    @property
    def of_x(self) -> Tensor | None:
        """[K, B, I, H, W], samples innermost."""
        return None if self._of_x is None else self._of_x.whole.movedim(-1, 1)

    @property
    def of_weight(self) -> Tensor:
        """[K, O, I, h, w]."""
        return self._image.of_kernels(self._found, self._shape).contiguous()


class _OfStridedInput:
    """Gradient of the input, client by client: every window's own gradient is added up where the window was."""

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
