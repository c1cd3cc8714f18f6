"""Dense layers of a stack: x W + b for each client, with ReLU behind some of them.

A chain of layers is one operation, as what a step costs besides arithmetic grows with the number of operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmm import native


def dense(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, bool]]) -> Tensor:
    """Layers one after the other; the gradient of x lies in memory as x does, samples innermost or not.

    Args:
        x: [K, B, in].
        layers: Weights [K, in, out] and biases [K, 1, out] of each, and whether ReLU follows.

    Returns:
        [K, B, out of the last].
    """
    parameters = [t for weight, bias, _ in layers for t in (weight, bias)]
    if native.usable(x, *parameters):
        return _Dense.apply(x, [rectified for *_, rectified in layers], *parameters)  # type: ignore[no-any-return, no-untyped-call]
    for weight, bias, rectified in layers:
        x = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
        x = torch.relu(x) if rectified else x
    return x


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rectified: Sequence[bool], *parameters: Tensor | None) -> Tensor:
        """The layers."""
        values, weights = [x], []
        for weight, bias, last in zip(parameters[::2], parameters[1::2], rectified, strict=True):
            assert weight is not None
            out, weight = native.linear(values[-1], weight, bias, last)
            values.append(out)
            weights.append(weight)
        ctx.save_for_backward(*values, *weights)
        ctx.rectified = rectified
        return values[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of all parameters."""
        need_x, _, *needed = ctx.needs_input_grad
        count = len(ctx.rectified)
        values, weights = ctx.saved_tensors[: count + 1], ctx.saved_tensors[count + 1 :]
        found: list[Tensor | None] = []
        of_x: Tensor | None = gradient
        for i in reversed(range(count)):
            assert of_x is not None
            out = values[i + 1] if ctx.rectified[i] else None
            needs = need_x or any(needed[: 2 * i]), needed[2 * i], needed[2 * i + 1]
            of_x, of_weight, of_bias = native.linear_back(values[i], weights[i], out, of_x, needs)
            found += [of_bias, of_weight]
            if not needs[0]:
                found += [None] * (2 * i)
                break
        return of_x, None, *reversed(found)
