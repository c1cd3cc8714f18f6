"""Layers of a stack on a CPU with samples innermost: activations of shape [K, B, C, H, W] lie as [K, C, H, W, B].

Elementwise work then runs over all samples at once, however few channels there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmm.native import images as kernels


def samples_innermost(x: Tensor) -> Tensor:
    """The same tensor [K, B, C, ...] with its memory as [K, C, ..., B]; free if it is so already."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, *, rectified: bool = False
) -> Tensor:
    """Group normalisation of each sample (Wu and He, 2018), with each client's scale and shift, by `fedmm.native`.

    Args:
        x: [K, B, C, H, W].
        weight: [K, C].
        bias: [K, C].
        groups: Of channels.
        eps: Added to the variance.
        rectified: Whether ReLU follows.

    Returns:
        The shape of x, samples innermost.
    """
    return _GroupNorm.apply(x, weight, bias, groups, eps, rectified)  # type: ignore[no-any-return, no-untyped-call]


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


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, rectified: bool
    ) -> Tensor:
        """The normalised samples."""
        images = samples_innermost(x).movedim(1, -1)
        out, means, scales, weight = kernels.normalise(images, weight, bias, groups, eps, rectified)
        ctx.save_for_backward(images, weight, out if rectified else None, means, scales)
        return out.movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        images, weight, out, means, scales = ctx.saved_tensors
        of_images, of_weight, of_bias = kernels.normalise_back(
            images, weight, out, gradient.movedim(1, -1).contiguous(), means, scales, ctx.needs_input_grad[:3]
        )
        return None if of_images is None else of_images.movedim(-1, 1), of_weight, of_bias, None, None, None
