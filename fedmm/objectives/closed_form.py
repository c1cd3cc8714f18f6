"""Losses whose gradients are written down: what autograd would make of them takes several times as many operations.

Everything here but `with_gradient` is outside of autograd. Shapes as in `fedmm.objectives.base`, in a stack or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmm import native
from fedmm.objectives.base import FEW_CLASSES, true_class
from fedmm.types import Batch

Slopes = tuple[Tensor, Sequence[Tensor]]
"""Gradients [..., M, B, *rest] of a value with respect to M tensors [..., B, *rest], and these tensors."""


def with_gradient(value: Tensor, *slopes: Slopes) -> Tensor:
    """A value [...] that has the gradients that are given."""
    if value.dim():
        of, inputs = [each for each, _ in slopes], [x for _, some in slopes for x in some]
        return cast(Tensor, _Known.apply(value, of, *inputs))  # type: ignore[no-untyped-call]
    # Of a single client: what functions of autograd's own can be vectorised over, too.
    line = torch.stack([(x * slope).sum() for of, some in slopes for slope, x in zip(of, some, strict=True)]).sum()
    return value + (line - line.detach())


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, slopes: list[Tensor], *inputs: Tensor) -> Tensor:
        """The value."""
        ctx.save_for_backward(*slopes)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The slopes of each input times the value's gradient."""
        found: list[Tensor] = []
        for slopes in ctx.saved_tensors:
            found += (slopes * gradient.reshape(*gradient.shape, *[1] * (slopes.dim() - gradient.dim()))).unbind(
                gradient.dim()
            )
        return None, None, *found


def hard(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """CE(o, y) [..., B] of logits [..., B, C] with labels [..., B], and softmax(o)."""
    if _natively(logits):
        return native.cross_entropy(logits.contiguous(), y.contiguous())
    total = logits.logsumexp(-1, keepdim=True)
    return total.squeeze(-1) - true_class(logits, y), (logits - total).exp()


def hard_slopes(probabilities: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weight (softmax(o) - 1[c = y]) [..., B, C]: the gradient of weight CE(o, y)."""
    if _natively(probabilities, weight):
        return native.cross_entropy_back(probabilities, y.contiguous(), weight.contiguous())
    scaled = probabilities * weight.unsqueeze(-1)
    return scaled.scatter_add_(-1, y.unsqueeze(-1), -weight.unsqueeze(-1))


def soft(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """- sum_c q_c log softmax(o)_c [..., B] of logits and of q, which sums to 1, [..., B, C], and softmax(o)."""
    if _natively(logits, targets):
        return native.cross_entropy(logits.contiguous(), targets.contiguous())
    total = logits.logsumexp(-1, keepdim=True)
    return total.squeeze(-1) - (targets * logits).sum(-1), (logits - total).exp()


def _natively(logits: Tensor, *others: Tensor) -> bool:
    """Whether the kernels shall do it: for stacks of clients, [K, M, B, C], in one number format."""
    return logits.dim() > 3 and logits.shape[-1] < FEW_CLASSES and native.usable(logits, *others)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, a few classes: `torch.softmax` takes several times as long there."""
    return (logits - logits.logsumexp(-1, keepdim=True)).exp()


def mean_weights(given: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [..., B] of those that are `given`, bool [..., B], in their mean; zeros if nobody is."""
    return given.to(dtype) / given.sum(-1, keepdim=True).clamp(min=1)


def whole_weights(batch: Batch, dtype: torch.dtype) -> Tensor | None:
    """The batch's weights [..., B] if every sample has every modality: then they are those of any mean over samples."""
    weight = batch.weight
    return weight if batch.whole and weight is not None and weight.dtype == dtype else None
