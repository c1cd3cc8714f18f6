"""Layers of a stack with samples innermost: what PyTorch's layers give each client, and the gradients of that."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmm.models.convolution import Geometry, convolve
from fedmm.models.dense import dense
from fedmm.models.innermost import flat_samples, group_norm, samples_innermost
from fedmm.models.stacked import Pool

pytestmark = pytest.mark.kernels

CLIENTS, BATCH = 2, 3
GEOMETRIES = [
    Geometry(*pairs)
    for pairs in itertools.product(
        [(3, 3), (1, 1), (2, 4)],
        [(1, 1), (2, 1), (3, 2)],
        [(0, 0), (1, 2), (3, 3)],
        [(1, 1), (2, 1), (1, 2)],
    )
]
CHANNELS = [(2, 4), (1, 4), (2, 16), (1, 1)]
"""Of input and output: images lie in memory otherwise for one, and products are turned for few."""
SOME = [g for i, g in enumerate(GEOMETRIES) if i % 9 == 4] + [Geometry((3, 3), (1, 1), (1, 1), (1, 1))]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=draw.generator).requires_grad_()


@pytest.fixture(autouse=True)
def generator():
    draw.generator = torch.Generator().manual_seed(0)


def assert_as(ours, reference, ours_of, given):
    """Values and gradients agree."""
    assert ours.shape == reference.shape
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    g = torch.randn(ours.shape, dtype=ours.dtype, generator=draw.generator)
    for a, b in zip(torch.autograd.grad(ours, ours_of, g), torch.autograd.grad(reference, given, g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inside", "outside"), CHANNELS)
def test_convolution_of_each_client(inside, outside, bias):
    for g in GEOMETRIES if bias else GEOMETRIES[::5]:
        x, w = draw(CLIENTS, BATCH, inside, 9, 10), draw(CLIENTS, outside, inside, *g.kernel)
        b = draw(CLIENTS, outside) if bias else None
        each = [
            F.conv2d(x[k], w[k], None if b is None else b[k], g.stride, g.padding, g.dilation) for k in range(CLIENTS)
        ]
        given = [t for t in (x, w, b) if t is not None]
        assert_as(convolve(x, w, b, g), torch.stack(each), given, given)


@pytest.mark.parametrize("g", SOME, ids=str)
def test_gradients_of_the_convolution(g):
    x, w, b = draw(1, 2, 1, 5, 6), draw(1, 2, 1, *g.kernel), draw(1, 2)
    assert torch.autograd.gradcheck(lambda *given: convolve(*given, g), (x, w, b))


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize(("inside", "outside"), CHANNELS)
def test_convolution_with_what_follows(inside, outside, pooled, rectified):
    for g, bias in itertools.product([*SOME, *GEOMETRIES[::7]], [True, False]):
        x, w = draw(CLIENTS, BATCH, inside, 9, 11), draw(CLIENTS, outside, inside, *g.kernel)
        b = draw(CLIENTS, outside) if bias else None
        each = []
        for k in range(CLIENTS):
            y = F.conv2d(x[k], w[k], None if b is None else b[k], g.stride, g.padding, g.dilation)
            y = F.max_pool2d(y, 2) if pooled else y
            each.append(F.relu(y) if rectified else y)
        given = [t for t in (x, w, b) if t is not None]
        assert_as(convolve(x, w, b, g, pooled=pooled, rectified=rectified), torch.stack(each), given, given)


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("batch", [8, 32])
def test_of_equal_values_the_first_has_the_gradient(batch, rectified):
    """Few different numbers: about every second window has its largest value more than once."""
    g = Geometry((2, 2), (1, 1), (1, 1), (1, 1))
    x, w, b = (draw(*s).round().detach().requires_grad_() for s in ((1, batch, 1, 7, 6), (1, 3, 1, 2, 2), (1, 3)))
    conv = F.conv2d(x[0], w[0], b[0], padding=1)
    windows = conv.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    ties = (windows == windows.amax(4, keepdim=True)).sum(4) > 1
    assert 0.2 < ties.double().mean() < 0.8
    y = F.max_pool2d(conv, 2)
    y = F.relu(y) if rectified else y
    assert_as(convolve(x, w, b, g, pooled=True, rectified=rectified), y[None], [x, w, b], [x, w, b])


def test_a_window_with_nan_is_nan():
    g = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
    for place in itertools.product(range(2), range(2)):
        x = torch.arange(4.0).view(1, 1, 1, 2, 2).clone()
        x[0, 0, 0, place[0], place[1]] = torch.nan
        assert convolve(x, torch.ones(1, 1, 1, 1, 1), None, g, pooled=True, rectified=True).isnan().all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("rectified", [True, False])
def test_a_gradient_that_is_not_finite_reaches_the_weights(value, rectified):
    """Else a client that diverges would seem to learn."""
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    x, w, b = draw(CLIENTS, BATCH, 2, 8, 8), draw(CLIENTS, 4, 2, 3, 3), draw(CLIENTS, 4)
    y = convolve(x, w, b, g, pooled=True, rectified=rectified)
    alive = y[1, 2, 3].argmax()
    given = torch.zeros_like(y)
    given[1, 2, 3].view(-1)[alive] = value
    for found in torch.autograd.grad(y, (x, w, b), given):
        assert found[0].isfinite().all()
        assert not found[1].isfinite().all()


@pytest.mark.parametrize("inside", [1, 2])
def test_an_image_of_the_same_shape_finds_nothing_of_the_one_before(inside):
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    first, second, w = draw(1, 8, inside, 5, 5), draw(1, 8, inside, 5, 5), draw(1, 3, inside, 3, 3)
    before = convolve(second, w, None, g)
    convolve(first, w, None, g)
    assert torch.equal(convolve(second, w, None, g), before)


def test_an_odd_last_row_finds_nothing_of_the_one_before():
    """Max-pooling leaves it out: its gradient is zero, whatever its memory held."""
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    x, w = draw(1, 8, 2, 5, 5), draw(1, 3, 2, 3, 3)
    first, second = [], []
    for found in (first, second):
        found += torch.autograd.grad(convolve(x, w, None, g, pooled=True).sum(), (x, w))
        torch.autograd.grad(convolve(x, w, None, g).square().sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1)])
def test_an_image_of_one_row_or_column(shape):
    g = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    x, w = draw(CLIENTS, BATCH, 2, *shape), draw(CLIENTS, 4, 2, 3, 3)
    each = [F.conv2d(x[k], w[k], padding=1) for k in range(CLIENTS)]
    assert_as(convolve(x, w, None, g), torch.stack(each), [x, w], [x, w])


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_group_normalisation_of_each_client(affine, rectified):
    x = draw(CLIENTS, BATCH, 6, 4, 5)
    w, b = (draw(CLIENTS, 6), draw(CLIENTS, 6)) if affine else (None, None)
    each = [F.group_norm(x[k], 3, None if w is None else w[k], None if b is None else b[k]) for k in range(CLIENTS)]
    each = [F.relu(y) if rectified else y for y in each]
    given = [t for t in (x, w, b) if t is not None]
    assert_as(group_norm(x, w, b, 3, 1e-5, rectified=rectified), torch.stack(each), given, given)


def test_gradients_of_the_group_normalisation():
    given = draw(1, 2, 4, 2, 3), draw(1, 4), draw(1, 4)
    assert torch.autograd.gradcheck(lambda *t: group_norm(*t, 2, 1e-5), given)


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_pooling_of_each_client(layer):
    x = draw(CLIENTS, BATCH, 3, 7, 6)
    assert_as(Pool(layer)(x), torch.stack([layer(x[k]) for k in range(CLIENTS)]), [x], [x])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layer_of_each_client(bias):
    x, w, b = draw(CLIENTS, 5, BATCH), draw(CLIENTS, 5, 4), draw(CLIENTS, 1, 4) if bias else None
    given = [t for t in (x, w, b) if t is not None]
    rows = x.transpose(1, 2)
    assert_as(dense(rows, [(w, b, False)]), rows @ w + (0 if b is None else b), given, given)


def test_layers_hand_on_samples_innermost_without_a_copy():
    x, w = draw(CLIENTS, 8, 2, 6, 6), draw(CLIENTS, 4, 2, 3, 3)
    y = convolve(x, w, None, Geometry((3, 3), (1, 1), (1, 1), (1, 1)))
    for t in (y, Pool(nn.MaxPool2d(2))(y), group_norm(y, None, None, 2, 1e-5), F.relu(y)):
        assert samples_innermost(t).data_ptr() == t.data_ptr()
        assert flat_samples(t).data_ptr() == t.data_ptr()
    found = []
    flat = flat_samples(y)
    for t in (y, flat):
        t.register_hook(found.append)
    dense(flat, [(draw(CLIENTS, 4 * 36, 5), None, False)]).sum().backward()
    assert found[0].transpose(1, 2).is_contiguous()
    assert found[1].data_ptr() == found[0].data_ptr()
    assert samples_innermost(found[1]).data_ptr() == found[1].data_ptr()
