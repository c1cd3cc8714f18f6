"""Cross-entropy of stacked clients: the same numbers as the library's, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F

from fedmm.objectives.base import cross_entropy


def both(logits, y):
    weight = torch.linspace(-1, 2, y.numel(), dtype=logits.dtype).view(y.shape)
    found = []
    for values in (
        cross_entropy,
        lambda o, y: F.cross_entropy(o.flatten(0, -2), y.flatten(), reduction="none").view(y.shape),
    ):
        o = logits.clone().requires_grad_()
        loss = values(o, y)
        found.append((loss.detach(), torch.autograd.grad((loss * weight).sum(), o)[0]))
    return zip(*found, strict=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(3, 5, 10), (2, 8, 2), (4, 3, 15), (2, 3, 40), (7, 10)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_the_librarys(shape, scale, dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(shape, generator=generator, dtype=dtype)
    y = torch.randint(shape[-1], shape[:-1], generator=generator)
    for mine, library in both(logits, y):
        assert mine.dtype == dtype
        assert torch.allclose(mine, library, rtol=tolerance, atol=tolerance)


def test_half_precision_is_summed_in_single():
    logits = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = torch.arange(12).view(2, 6) % 12
    exact = cross_entropy(logits.double(), y)
    assert torch.allclose(cross_entropy(logits, y).double(), exact, rtol=2**-8, atol=2**-8)


def test_logits_that_are_not_finite_give_a_loss_that_is_not():
    logits = torch.zeros(2, 2, 3)
    logits[1, 0, 1] = torch.nan
    loss = cross_entropy(logits, torch.zeros(2, 2, dtype=torch.int64))
    assert torch.isnan(loss).tolist() == [[False, False], [True, False]]
