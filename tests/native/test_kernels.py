"""The compiled kernels: what PyTorch gives, on every set of instructions, and the same bits whatever is beside them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fedmm import native
from fedmm.models.convolution import Geometry, convolve
from fedmm.models.dense import dense
from fedmm.models.innermost import group_norm
from fedmm.native.centres import add_hits, add_members, distances, pulls
from fedmm.objectives.base import cross_entropy

pytestmark = pytest.mark.kernels

CLOSE = {torch.float32: 2e-5, torch.float64: 1e-12}
SHAPES = [(1, 1, 1), (3, 5, 7), (8, 16, 10), (13, 9, 33), (32, 40, 64), (7, 70, 100)]
"""Rows, inputs, outputs: parts of vectors and tiles, and whole ones."""


@pytest.fixture(params=range(len(native.INSTRUCTIONS)), ids=native.INSTRUCTIONS, autouse=True)
def instructions(request):
    if native.library.fedmm_level(request.param) != request.param:
        pytest.skip("this processor does not have them")
    yield
    native.library.fedmm_level(-1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_gradients(ours, reference, given, seed=9):
    """Values and gradients agree; rows of the last part of the batch have no gradient."""
    torch.testing.assert_close(ours, reference, rtol=0, atol=CLOSE[ours.dtype] * 10)
    g = draw(*ours.shape, dtype=ours.dtype, seed=seed)
    g[:, 2 * g.shape[1] // 3 :] = 0
    found, wanted = torch.autograd.grad(ours, given, g), torch.autograd.grad(reference, given, g)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE[ours.dtype] * 30)


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inside", "outside"), SHAPES)
def test_linear(rows, inside, outside, bias, rectified, dtype):
    x = draw(3, rows, inside, dtype=dtype).requires_grad_()
    w = draw(3, inside, outside, dtype=dtype, seed=1).requires_grad_()
    b = draw(3, 1, outside, dtype=dtype, seed=2).requires_grad_() if bias else None
    y = x @ w + (b if bias else 0)
    assert_gradients(
        dense(x, [(w, b, rectified)]), F.relu(y) if rectified else y, [t for t in (x, w, b) if bias or t is not b]
    )


def test_layers_one_after_the_other(dtype):
    x = draw(2, 6, 5, dtype=dtype).requires_grad_()
    layers = [
        (draw(2, a, b, dtype=dtype, seed=a).requires_grad_(), draw(2, 1, b, dtype=dtype, seed=b).requires_grad_(), last)
        for (a, b), last in zip(itertools.pairwise((5, 12, 9, 4)), (True, False, True), strict=True)
    ]
    y = x
    for w, b, rectified in layers:
        y = y @ w + b
        y = F.relu(y) if rectified else y
    assert_gradients(dense(x, layers), y, [x, *(t for w, b, _ in layers for t in (w, b))])


@pytest.mark.parametrize("needed", [("x",), ("w",), ("b",), ("w", "b")])
def test_only_what_is_asked_for_has_a_gradient(needed, dtype):
    given = {"x": draw(2, 4, 3, dtype=dtype), "w": draw(2, 3, 5, dtype=dtype), "b": draw(2, 1, 5, dtype=dtype)}
    for n in needed:
        given[n].requires_grad_()
    y = dense(given["x"], [(given["w"], given["b"], False)])
    found = torch.autograd.grad(y.square().sum(), [given[n] for n in needed])
    z = given["x"] @ given["w"] + given["b"]
    for a, b in zip(found, torch.autograd.grad(z.square().sum(), [given[n] for n in needed]), strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE[dtype] * 10, atol=CLOSE[dtype] * 10)


def test_clients_that_share_weights_and_samples_in_any_order_of_memory(dtype):
    w = draw(1, 6, 5, dtype=dtype).expand(4, 6, 5).requires_grad_()
    b = draw(1, 1, 5, dtype=dtype).expand(4, 1, 5).requires_grad_()
    for x in (
        draw(4, 6, 8, dtype=dtype).transpose(1, 2),
        draw(8, 4, 6, dtype=dtype).transpose(0, 1),
        draw(4, 8, 12, dtype=dtype)[..., ::2],
        draw(1, 8, 6, dtype=dtype).expand(4, 8, 6),
    ):
        x.requires_grad_()
        assert_gradients(dense(x, [(w, b, False)]), x @ w + b, [x, w, b])
        (of_x,) = torch.autograd.grad(dense(x, [(w, b, False)]).sum(), x)
        assert of_x.stride(1) == 1 or x.stride(1) != 1, "samples stay innermost"


def test_rows_that_fill_up_a_batch_change_no_bit(dtype):
    """A client trains alone as in any company: with more rows of weight zero, and among more clients."""
    w, b = draw(5, 20, 12, dtype=dtype), draw(5, 1, 12, dtype=dtype, seed=1)
    x, g = draw(5, 40, 20, dtype=dtype, seed=2), draw(5, 40, 12, dtype=dtype, seed=3)

    def bits(clients, rows, real=21):
        given = [t[:clients].clone().requires_grad_() for t in (x[:, :rows], w, b)]
        y = dense(given[0], [(given[1], given[2], True)])
        of = g[:clients, :rows].clone()
        of[:, real:] = 0
        of_x, *others = torch.autograd.grad(y, given, of)
        return [t[0] for t in (y[:, :real], of_x[:, :real], *others)]

    wanted = bits(5, 40)
    for clients, rows in ((1, 40), (1, 24), (3, 21), (5, 32)):
        assert all(torch.equal(a, b) for a, b in zip(bits(clients, rows), wanted, strict=True))


@pytest.mark.parametrize("normed", [True, False])
def test_samples_that_fill_up_a_batch_change_no_bit_of_images(normed, dtype):
    x, w, b = (draw(3, *s, dtype=dtype, seed=i) for i, s in enumerate(((40, 2, 9, 10), (8, 2, 3, 3), (8,))))
    s, t = draw(3, 8, dtype=dtype, seed=4), draw(3, 8, dtype=dtype, seed=5)

    def bits(clients, rows, real, stride):
        given = [a[:clients].clone().requires_grad_() for a in (x[:, :rows], w, b, s, t)]
        geometry = Geometry((3, 3), (stride, stride), (1, 1), (1, 1))
        if normed:
            y = group_norm(convolve(*given[:3], geometry), given[3], given[4], 4, 1e-5, rectified=True)
        else:
            y, given = convolve(*given[:3], geometry, pooled=True, rectified=True), given[:3]
        of = torch.zeros_like(y)
        of[:, :real] = draw(3, real, *y.shape[2:], dtype=dtype, seed=6)[:clients]
        of_x, *others = torch.autograd.grad(y, given, of)
        return [a[0] for a in (y[:, :real], of_x[:, :real], *others)]

    for real, stride in itertools.product((5, 13, 24), (1, 2)):
        wanted = bits(3, 40, real, stride)
        for clients, rows in ((1, real), (1, -(-real // 8) * 8), (2, 32)):
            assert all(torch.equal(a, b) for a, b in zip(bits(clients, rows, real, stride), wanted, strict=True))


@pytest.mark.parametrize(("pooled", "rectified"), [(a, b) for a in (True, False) for b in (True, False)])
@pytest.mark.parametrize("batch", [1, 8, 13, 32])
def test_convolution(batch, pooled, rectified, dtype):
    for g in (Geometry((3, 3), (1, 1), (1, 1), (1, 1)), Geometry((5, 2), (2, 1), (2, 3), (1, 2))):
        x, w, b = (
            draw(2, *s, dtype=dtype, seed=i).requires_grad_()
            for i, s in enumerate(((batch, 3, 11, 8), (10, 3, *g.kernel), (10,)))
        )
        each = []
        for k in range(2):
            y = F.conv2d(x[k], w[k], b[k], g.stride, g.padding, g.dilation)
            y = F.max_pool2d(y, 2) if pooled else y
            each.append(F.relu(y) if rectified else y)
        assert_gradients(convolve(x, w, b, g, pooled=pooled, rectified=rectified), torch.stack(each), [x, w, b])


@pytest.mark.parametrize("batch", [3, 8, 24, 32])
@pytest.mark.parametrize("rectified", [True, False])
def test_group_normalisation(batch, rectified, dtype):
    x = draw(2, batch, 6, 5, 4, dtype=dtype).requires_grad_()
    w, b = draw(2, 6, dtype=dtype, seed=1).requires_grad_(), draw(2, 6, dtype=dtype, seed=2).requires_grad_()
    each = torch.stack([F.group_norm(x[k], 3, w[k], b[k]) for k in range(2)])
    assert_gradients(group_norm(x, w, b, 3, 1e-5, rectified=rectified), F.relu(each) if rectified else each, [x, w, b])


@pytest.mark.parametrize("leaf", [1, 2, 8])
def test_sums_over_a_tree_in_double_precision(leaf, dtype):
    """Its order written out: leaves place after place, above them pairs of neighbours."""
    rows, weights = draw(16, 1000, dtype=dtype), draw(16, dtype=torch.float64, seed=1)
    there = [0, 1, 3, 8, 9, 10, 11, 12, 15]
    leaves = []
    for first in range(0, 16, leaf):
        mine = [p for p in there if first <= p < first + leaf]
        leaves.append(sum((weights[p] * rows[p].double() for p in mine), torch.zeros(1000, dtype=torch.float64)))
    while len(leaves) > 1:
        leaves = [a + b for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    first, rest = there[:4], there[4:]
    whole = [(first, rows[first]), (rest, rows[rest])]
    found = native.trees([whole, [(places, part[:, :37].contiguous()) for places, part in whole]], weights, leaf)
    # A processor that multiplies and adds at once rounds once.
    for total, numbers in zip(found, (1000, 37), strict=True):
        torch.testing.assert_close(total, leaves[0][:numbers], rtol=1e-15, atol=1e-15)


def test_what_kernels_cannot_do_is_left_to_pytorch():
    x, w = torch.randn(2, 4, 3), torch.randn(2, 3, 5)
    assert native.usable(x, w, None)
    assert not native.usable(x, w.double())
    assert not native.usable(x.bfloat16(), w.bfloat16())
    assert not native.usable(x.to("meta"), w.to("meta"))
    low = dense(x.bfloat16(), [(w.bfloat16(), None, True)])
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), F.relu(x @ w), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("classes", [1, 2, 10, 31])
def test_cross_entropy(classes, dtype):
    logits = (5 * draw(3, 12, classes, dtype=dtype)).requires_grad_()
    y = torch.randint(0, classes, (3, 12), generator=torch.Generator().manual_seed(0))
    reference = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(3, 12)
    assert_gradients(cross_entropy(logits, y), reference, [logits])


def test_a_label_that_names_no_class_has_no_loss():
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    found = cross_entropy(logits, torch.tensor([[1, 4, -1]]))
    assert found.isnan().tolist() == [[False, True, True]]
    assert torch.autograd.grad(found[0, 0], logits)[0].isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 10, 31])
def test_soft_cross_entropy(classes, dtype):
    logits, targets = 5 * draw(3, 12, classes, dtype=dtype), draw(3, 12, classes, dtype=dtype, seed=1).softmax(-1)
    losses, probabilities = native.cross_entropy(logits, targets)
    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view(3, 12)
    assert torch.allclose(losses, reference, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert torch.allclose(probabilities, logits.softmax(-1), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("classes", "width"), [(2, 3), (10, 64), (37, 20)])
def test_distances_to_centres_and_pulls(classes, width, shared, dtype):
    h = draw(3, 2, 5, width, dtype=dtype)
    centres = draw(1 if shared else 3, 2, classes, width, dtype=dtype, seed=1)
    centres = centres.expand(3, *centres.shape[1:])
    h[1, 0, 2] = centres[1, 0, 1]  # on a centre
    least, r = torch.full((3, 2, 1, 1), 0.01, dtype=dtype), draw(3, 2, 5, classes, dtype=dtype, seed=2)
    apart = h.unsqueeze(-2) - centres.unsqueeze(-3)
    expected = -apart.square().sum(-1).clamp(min=0.01).sqrt()
    found = distances(h, centres, least)
    assert torch.allclose(found, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert float(found[1, 0, 2, 1]) == pytest.approx(-0.1)
    pulled = pulls(h, centres, r)
    assert torch.allclose(pulled, (r.unsqueeze(-1) * apart).sum(-2), rtol=10 * CLOSE[dtype], atol=10 * CLOSE[dtype])


@pytest.mark.parametrize(("classes", "width"), [(2, 3), (10, 64), (13, 20)])
def test_classes_sums_and_nearest_centres(classes, width, dtype):
    h = draw(3, 2, 40, width, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, classes, (3, 40), generator=generator)
    present = torch.rand(3, 2, 40, generator=generator) > 0.3
    present[1, 1] = False
    member = ((y.unsqueeze(1).unsqueeze(2) == torch.arange(classes).view(-1, 1)) & present.unsqueeze(2)).double()
    total, count = torch.ones(3, 2, classes, width, dtype=torch.float64), torch.ones(3, 2, classes, dtype=torch.float64)
    add_members(h, y, present, total, count)
    torch.testing.assert_close(total - 1, member @ h.double())
    assert torch.equal(count - 1, member.sum(-1))
    centres, count = draw(3, 2, classes, width, dtype=torch.float64, seed=2), member.sum(-1)
    apart = torch.cdist(h.double(), centres).masked_fill((count == 0).unsqueeze(-2), torch.inf)
    expected = ((apart.argmin(-1) == y.unsqueeze(1)) & present).sum(-1)
    hits = torch.zeros(3, 2, dtype=torch.float64)
    add_hits(h, y, present, centres, count, hits)
    assert torch.equal(hits, expected.double())
