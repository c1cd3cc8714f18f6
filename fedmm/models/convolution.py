"""Convolutions of a stack on a CPU, by the kernels of `fedmm.native`.

oneDNN's kernels vectorise over channels and want many of them; small networks have eight. Here the samples are
innermost, [K, C, H, W, B], and an output row r is one product over the taps t of the kernel with rows of the padded
image, as they lie in memory:

    y_r[o, n] = b[o] + sum over t of W[o, t] x[n + at(r, t)]        n: columns and samples, W' B
    dL/dW[o, t] = sum over r and n of dL/dy_r[o, n] x[n + at(r, t)]
    dL/dx[i, n] = sum over o and t of W[o, i, t] dL/dy[o, n - at(t)], for positions n a stride apart at a time

Max-pooling by 2 x 2 and ReLU that follow are done where two rows arise: of values of full size, none travels to memory.
A client's bits do not depend on the others, but on the number of rows B of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from fedmm.models.innermost import samples_innermost
from fedmm.native import images as kernels

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image: height and width each.

    Attributes:
        kernel: Taps.
        stride: Steps between outputs.
        padding: Zeros at each side.
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

    @property
    def moves(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation."""
        return self.stride, self.padding, self.dilation


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


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, pooled: bool, rectified: bool
    ) -> Tensor:
        """The convolution, and what follows it."""
        images = samples_innermost(x).movedim(1, -1)
        high, wide = geometry.size((images.shape[2], images.shape[3]))
        size = (high // 2, wide // 2) if pooled else (high, wide)
        out, which, weight = kernels.convolve(images, weight, bias, geometry.moves, size, pooled, rectified)
        ctx.save_for_backward(images, weight, which)
        ctx.how = geometry.moves, pooled, rectified
        return out.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        images, weight, which = ctx.saved_tensors
        moves, pooled, rectified = ctx.how
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        of_images, of_weight, of_bias = kernels.convolve_back(
            images,
            weight,
            gradient.movedim(1, -1).contiguous(),
            which,
            moves,
            pooled,
            rectified,
            (need_x, need_bias),
        )
        return None if of_images is None else of_images.movedim(-1, 1), of_weight, of_bias, None, None, None
