"""Layers that a stack's convolutions do themselves: which, and that each client's model is the plain one."""

import copy

import pytest
import torch
from torch import nn

from fedmm import native
from fedmm.config.schema import ModelConfig
from fedmm.models import build_model
from fedmm.models.stacked import Conv2d, Stack
from fedmm.types import ModalitySpec

CLIENTS, BATCH = 3, 8


def conv():
    return nn.Conv2d(2, 4, 3, padding=1)


CHAINS = {
    "pool, ReLU": ([conv(), nn.MaxPool2d(2), nn.ReLU()], "pr", 2),
    "ReLU, pool": ([conv(), nn.ReLU(), nn.MaxPool2d(2, 2)], "pr", 2),
    "nothing in between": ([conv(), nn.Identity(), nn.MaxPool2d((2, 2)), nn.Identity(), nn.ReLU()], "pr", 2),
    "ReLU only": ([conv(), nn.ReLU(), nn.Tanh()], "r", 1),
    "pool twice": ([conv(), nn.MaxPool2d(2), nn.MaxPool2d(2)], "p", 1),
    "not by 2 x 2": ([conv(), nn.MaxPool2d(2, 1), nn.ReLU()], "", 0),
    "up": ([conv(), nn.MaxPool2d(2, ceil_mode=True)], "", 0),
    "mean": ([conv(), nn.AvgPool2d(2)], "", 0),
    "something in between": ([conv(), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.ReLU()], "", 0),
    "normalised, ReLU": ([conv(), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)], "", 1),
    "before": ([nn.ReLU(), nn.MaxPool2d(2), conv()], "", 0),
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("layers", "does", "merged"), CHAINS.values(), ids=CHAINS)
def test_what_a_convolution_does(layers, does, merged, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "library", None)
    generator = torch.Generator().manual_seed(0)
    model = build_model({"m": ModalitySpec("image", (2, 9, 7))}, 3, ModelConfig(encoder="convnet"), 0).double()
    alone = nn.Sequential(*copy.deepcopy(layers)).double()
    model.encoder["m"] = alone
    stack = Stack(model)
    twin = stack.model.encoder["m"]
    idle = sum(isinstance(layer, nn.Identity) for layer in twin)
    assert idle == merged + sum(isinstance(layer, nn.Identity) for layer in layers)
    assert [layer.pooled * "p" + layer.rectified * "r" for layer in twin if isinstance(layer, Conv2d)] == [does]
    plain = {n: t for n, t in model.state_dict().items() if n.startswith("encoder.")}
    drawn = {n: torch.randn(CLIENTS, *t.shape, generator=generator, dtype=t.dtype) for n, t in plain.items()}
    bound = stack.bind({n: stack.stack(n, t) for n, t in drawn.items()})
    x = torch.randn(CLIENTS, BATCH, 2, 9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    y = twin(x)
    g = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    found = torch.autograd.grad(y, [x, *bound.values()], g)
    for k in range(CLIENTS):
        model.load_state_dict({n: t[k] for n, t in drawn.items()}, strict=False)
        each = alone(x[k])
        torch.testing.assert_close(y[k], each, rtol=0, atol=1e-12)
        of_x, *others = torch.autograd.grad(each, [x, *alone.parameters()], g[k])
        torch.testing.assert_close(found[0][k], of_x[k], rtol=0, atol=1e-12)
        for ours, theirs in zip(found[1:], others, strict=True):
            torch.testing.assert_close(ours[k], theirs, rtol=0, atol=1e-12)
