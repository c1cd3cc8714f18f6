"""Losses whose gradients are written down: what autograd makes of the same loss, of one client and of a stack."""

import pytest
import torch
from torch.nn import functional as F

from fedmm.objectives.closed_form import hard, hard_slopes, soft, with_gradient

SHAPES = [(2, 6, 10), (3, 2, 6, 10), (3, 2, 6, 40)]
"""[M, B, C], [K, M, B, C], and more classes than there are kernels for."""


def draw(shape, seed):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels(shape):
    logits, y = draw(shape, 0), torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    weight = draw(shape[:-1], 2)
    o = logits.clone().requires_grad_()
    each = F.cross_entropy(o.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
    (expected,) = torch.autograd.grad((each * weight).sum(), o)
    found, p = hard(logits, y)
    assert torch.allclose(found, each)
    assert torch.allclose(p, logits.softmax(-1))
    assert torch.allclose(hard_slopes(p, y, weight), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_distributions(shape):
    logits, q = draw(shape, 0), draw(shape, 1).softmax(-1)
    found, p = soft(logits, q)
    assert torch.allclose(found, -(q * logits.log_softmax(-1)).sum(-1))
    assert torch.allclose(p, logits.softmax(-1))


def test_number_formats_may_differ():
    """Kernels read memory as one format: what is of another must not reach them."""
    logits, q, y = draw((3, 2, 6, 10), 0), draw((3, 2, 6, 10), 1).softmax(-1), torch.zeros(3, 2, 6, dtype=torch.int64)
    assert torch.allclose(soft(logits, q.float())[0], soft(logits, q)[0], atol=1e-5)
    weight = draw((3, 2, 6), 2)
    p = hard(logits, y)[1]
    assert torch.allclose(hard_slopes(p.float(), y, weight).double(), hard_slopes(p, y, weight), atol=1e-5)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_a_value_has_the_gradients_that_it_was_given(leading):
    inputs = [[draw((*leading, 4, 5), 10 * i + j).requires_grad_() for j in range(2)] for i in range(2)]
    slopes = [draw((*leading, 2, 4, 5), seed) for seed in (1, 2)]
    value, factor = draw(leading, 3), draw(leading, 4)
    known = with_gradient(value, *zip(slopes, inputs, strict=True))
    assert torch.equal(known, value)
    found = torch.autograd.grad((known * factor).sum(), [x for some in inputs for x in some])
    expected = [s * factor.view(*leading, 1, 1) for of in slopes for s in of.unbind(len(leading))]
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
