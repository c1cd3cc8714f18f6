"""Layers of a stack on a CPU with samples innermost: activations of shape [K, B, C, H, W] lie as [K, C, H, W, B].

Elementwise work then runs over all samples at once, however few channels there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def samples_innermost(x: Tensor) -> Tensor:
    """The same tensor [K, B, C, ...] with its memory as [K, C, ..., B]; free if it is so already."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


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
