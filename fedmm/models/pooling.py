"""Max-pooling by 2 x 2 of one image after another, in memory that stays in the processor's cache.

Of an image [H, C, W, B] come the largest values m [H / 2, C, W / 2, B] of the windows, and their places p, numbered by
rows; of equal values the first counts, as in PyTorch:

    l = max(left, right);   m = max(l_top, l_bottom), r = [l_bottom > l_top], c = [m > left_r];   p = c + 2 r

Back: the gradient at place i of a window is dL/dm where p = i, else 0. An odd last row or column is in no window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmm.models.scratch import scratch

_between = torch.ops.aten.hardtanh_backward.grad_input
"""_between(g, p, low, high, grad_input=out): g where low < p < high, else 0."""

RUN = 128
"""Bytes of a pixel's samples from which on larger values are as fast kept in the image: less memory in the cache."""


class Pooling:
    """The windows of an image, which `forward` writes over.

    Args:
        image: [H, C, W, B].

    Attributes:
        image: The same.
        size: Height and width of what comes of it.
    """

    def __init__(self, image: Tensor) -> None:
        high, wide = self.size = image.shape[0] // 2, image.shape[2] // 2
        _, channels, _, batch = image.shape
        self.image = image
        self._rest = image[2 * high :], image[:, :, 2 * wide :]
        windows = image[: 2 * high, :, : 2 * wide].view(high, 2, channels, wide, 2, batch)
        self._left, self._right = windows.unbind(4)
        self._places = [*self._left.unbind(1), *self._right.unbind(1)]
        short = batch * image.itemsize < RUN
        self._larger = scratch("larger", self._left.shape, image.dtype) if short else self._right
        self._rows = *self._larger.unbind(1), *self._left.unbind(1)

    def forward(self, largest: Tensor, place: Tensor) -> None:
        """Largest values and their places, of the image's shape by half."""
        top, bottom, top_left, bottom_left = self._rows
        torch.maximum(self._left, self._right, out=self._larger)
        torch.maximum(top, bottom, out=largest)
        lower = torch.gt(bottom, top, out=top)
        torch.lerp(top_left, bottom_left, lower, out=place)
        torch.gt(largest, place, out=place)
        place.add_(lower, alpha=2)

    def clear(self) -> None:
        """Zeros where no window is."""
        for rest in self._rest:
            rest.zero_()

    def backward(self, gradient: Tensor, place: Tensor) -> None:
        """The image's gradient in its place."""
        for into, i in zip(self._places, (0, 2, 1, 3), strict=True):
            _between(gradient, place, i - 0.5, i + 0.5, grad_input=into)
