"""Many clients' copies of one model as a single model: every parameter has a leading axis of K clients.

The twin is the same `MultimodalModel` with its layers replaced by stacked ones, so that encoders, fusions, heads and
objectives need no second version: they work on [K, B, ...] as they do on [B, ...].

    Linear      W [K, in, out], b [K, 1, out]     products (`fedmm.models.dense`); this order makes gradients contiguous
    ReLU, Linear after it in a Sequential         it does them, too
    Conv2d      W [K, O, I, h, w]                 CPU: products over samples (`fedmm.models.convolution`);
                                                  else: one grouped convolution with K groups
    pooling, ReLU after a convolution             it does them, too, if they are next in a Sequential
    ReLU after GroupNorm                          it does it, too
    GroupNorm, LayerNorm, pooling, Flatten        the same arithmetic in each client and sample
    Gate                                          [K, slots]

A layer without a rule is refused with a reason (`Unstackable`), and its model trains client by client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from fedmm import native
from fedmm.models.boosted import BoostedHead
from fedmm.models.boosted import Gate as PlainGate
from fedmm.models.convolution import Geometry, convolve
from fedmm.models.dense import dense
from fedmm.models.encoders import BasicBlock
from fedmm.models.fusion import FUSIONS
from fedmm.models.innermost import flat_samples, group_norm, samples_innermost
from fedmm.models.multimodal import MultimodalModel
from fedmm.types import Tensors


class Unstackable(Exception):
    """Why a model, or an objective, cannot train as a stack."""


class _Layer(nn.Module):
    """A layer whose parameters are bound later."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def affine(self) -> bool:
        """Whether there are parameters."""
        return self._parameters["weight"] is not None


class Linear(_Layer):
    """x W + b for each client.

    Attributes:
        rectified: Whether it does the ReLU that follows.
        after: Layers that follow, which it does, too.
        done: Whether a layer before does it.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.rectified = self.done = False
        self.after: list[Linear] = []

    def forward(self, x: Tensor) -> Tensor:
        """[K, ..., in] -> [K, ..., out]."""
        if self.done:
            return x
        rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
        out = dense(rows, [(layer.weight, layer.bias, layer.rectified) for layer in (self, *self.after)])
        return out if x.dim() == 3 else out.view(*x.shape[:-1], out.shape[-1])


class Conv2d(_Layer):
    """Each client's convolution.

    Attributes:
        pooled: Whether it does the max-pooling by 2 x 2 that follows.
        rectified: Whether it does the ReLU that follows.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise Unstackable("grouped convolutions and padding other than zeros have no stacked form")
        if isinstance(layer.padding, str):
            raise Unstackable(f'padding "{layer.padding}" has no stacked form: give it in numbers')
        pairs = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        self.geometry = Geometry(*((first, second) for first, second in pairs))
        self.pooled = self.rectified = False

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, I, H, W] -> [K, B, O, H', W']."""
        if native.usable(x, self.weight, self.bias):
            return convolve(x, self.weight, self.bias, self.geometry, pooled=self.pooled, rectified=self.rectified)
        clients = x.shape[0]
        bias = None if self.bias is None else self.bias.flatten()
        kernel, g = self.weight.flatten(0, 1), self.geometry
        y = F.conv2d(_side_by_side(x), kernel, bias, g.stride, g.padding, g.dilation, groups=clients)
        y = F.max_pool2d(y, 2) if self.pooled else y
        return _spread(F.relu(y) if self.rectified else y, clients)


class GroupNorm(_Layer):
    """Group normalisation of each sample, with each client's scale and shift.

    Attributes:
        rectified: Whether it does the ReLU that follows.
    """

    def __init__(self, layer: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = layer.num_groups, layer.eps
        self.rectified = False

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, ...] -> the same shape."""
        if x.dim() == 5 and native.usable(x, self.weight, self.bias):
            return group_norm(x, self.weight, self.bias, self.groups, self.eps, rectified=self.rectified)
        clients = x.shape[0]
        y = _spread(F.group_norm(_side_by_side(x), clients * self.groups, eps=self.eps), clients)
        if self.affine:
            shape = (clients, 1, -1, *[1] * (x.dim() - 3))
            assert self.bias is not None
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return F.relu(y) if self.rectified else y


class LayerNorm(_Layer):
    """Layer normalisation over the last axes, with each client's scale and shift, if any."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = layer.normalized_shape, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """[K, ..., *shape] -> the same shape."""
        y = F.layer_norm(x, self.shape, eps=self.eps)
        if not self.affine:
            return y
        shape = (x.shape[0], *[1] * (x.dim() - 1 - len(self.shape)), *self.shape)
        y = y * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


class Pool(nn.Module):
    """A pooling layer, which treats channels alike, on the channels of all clients."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    @property
    def halves(self) -> bool:
        """Whether it is max-pooling by 2 x 2, and nothing else."""
        layer = self.layer
        return (
            isinstance(layer, nn.MaxPool2d)
            and layer.kernel_size in (2, (2, 2))
            and layer.stride in (2, (2, 2))
            and layer.padding in (0, (0, 0))
            and layer.dilation in (1, (1, 1))
            and not layer.ceil_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, C, H, W] -> [K, B, C, H', W']."""
        if x.device.type != "cpu":
            return _spread(self.layer(_side_by_side(x)), x.shape[0])
        # Channels last, with the samples as channels.
        y: Tensor = self.layer(samples_innermost(x).transpose(1, 2).flatten(0, 1))
        return y.view(x.shape[0], -1, *y.shape[1:]).transpose(1, 2)


class Flatten(nn.Module):
    """Each sample as one row."""

    def forward(self, x: Tensor) -> Tensor:
        """[K, B, ...] -> [K, B, F]."""
        if x.dim() > 4 and x.device.type == "cpu":
            return flat_samples(x)
        return x.flatten(2)


class Gate(_Layer):
    """Each client's open slots."""

    def __init__(self, layer: PlainGate) -> None:
        super().__init__()

    def forward(self) -> Tensor:
        """Bool [K, slots]."""
        return self.weight.detach() > 0.5


def _flatten(layer: nn.Flatten) -> nn.Module:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise Unstackable("Flatten has a stacked form only for whole samples")
    return Flatten()


def _side_by_side(x: Tensor) -> Tensor:
    """[K, B, C, ...] -> [B, K C, ...]: clients as groups of channels; free on what `_spread` gave."""
    return x.transpose(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])


def _spread(x: Tensor, clients: int) -> Tensor:
    """[B, K C, ...] -> [K, B, C, ...]."""
    return x.view(x.shape[0], clients, -1, *x.shape[2:]).transpose(0, 1)


def _merge(layers: nn.Sequential) -> None:
    """Have layers do what follows: ReLU; convolutions max-pooling, too (the two commute); dense layers dense layers."""
    before: Conv2d | GroupNorm | Linear | None = None
    for name, layer in list(layers._modules.items()):
        if isinstance(layer, nn.ReLU) and before is not None:
            (before.after[-1] if isinstance(before, Linear) and before.after else before).rectified = True
            layers._modules[name] = nn.Identity()
        elif isinstance(layer, Pool) and layer.halves and isinstance(before, Conv2d) and not before.pooled:
            before.pooled, layers._modules[name] = True, nn.Identity()
        elif isinstance(layer, Linear) and isinstance(before, Linear):
            before.after.append(layer)
            layer.done = True  # it stays, as its parameters have its name
        elif not isinstance(layer, nn.Identity):
            before = layer if isinstance(layer, Conv2d | GroupNorm | Linear) else None


RULES: Mapping[type[nn.Module], Callable[..., nn.Module]] = MappingProxyType(
    {
        nn.Linear: Linear,
        nn.Conv2d: Conv2d,
        nn.GroupNorm: GroupNorm,
        nn.LayerNorm: LayerNorm,
        nn.MaxPool2d: Pool,
        nn.AvgPool2d: Pool,
        nn.AdaptiveAvgPool2d: Pool,
        nn.Flatten: _flatten,
        PlainGate: Gate,
    }
)
"""Layer -> what stands for it in a stack."""

_TRANSPARENT: tuple[type[nn.Module], ...] = (
    MultimodalModel,
    BasicBlock,
    BoostedHead,
    *FUSIONS.values(),
    nn.Sequential,
    nn.ModuleDict,
    nn.ModuleList,
    nn.Identity,
    nn.ConstantPad1d,  # on the last axis, whatever is before it
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
)


class Stack:
    """The stacked twin of a model.

    Args:
        model: The plain model; it is not changed.

    Attributes:
        model: The twin; it has no parameters until `bind`.
        channels: Most channels that a convolution gives; 0: there is none.

    Raises:
        Unstackable: A layer has no stacked form.
    """

    def __init__(self, model: MultimodalModel) -> None:
        if any(True for _ in model.buffers()):
            raise Unstackable("the model keeps running statistics, which rows that fill up a stack would spoil")
        self.model = copy.deepcopy(model)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        self.channels = max((layer.out_channels for layer in layers), default=0)
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        self._base: tuple[Tensors, Tensors] | None = None
        self._replace(self.model, "")
        self.model.eval()  # no layer that has a stacked form knows of modes

    def _replace(self, module: nn.Module, path: str) -> None:
        if not isinstance(module, _TRANSPARENT):
            raise Unstackable(f"{path or 'the model'} is a {type(module).__name__}, which has no stacked form")
        for name, child in list(module.named_children()):
            rule = RULES.get(type(child))
            if rule is None:
                self._replace(child, f"{path}{name}.")
                continue
            twin = rule(child)
            module._modules[name] = twin
            for attribute, _ in child.named_parameters(recurse=False):
                self._slots[f"{path}{name}.{attribute}"] = twin, attribute
        if isinstance(module, nn.Sequential):
            _merge(module)

    def bind(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Make stacked tensors [K, ...] the twin's parameters (they share memory); returns those parameters."""
        bound: Tensors = {}
        for name, tensor in tensors.items():
            module, attribute = self._slots[name]
            bound[name] = module._parameters[attribute] = nn.Parameter(tensor)
        return bound

    def expand(self, name: str, tensor: Tensor, clients: int) -> Tensor:
        """A plain tensor as K stacked ones that share its memory: never write to it."""
        stacked = self._to_stack(name, tensor)
        return stacked.unsqueeze(0).expand(clients, *stacked.shape)

    def share(self, name: str, tensor: Tensor, clients: int) -> Tensor:
        """Server knowledge as `clients` see it: copies of a model's tensors ("model.<name>") in the stack's layout."""
        own = name.removeprefix("model.")
        return self.expand(own, tensor, clients) if own != name else tensor.expand(clients, *tensor.shape)

    def expand_all(self, received: Tensors, clients: int) -> Tensors:
        """`expand` of all tensors of a model; stacks of one round share the model, whose layout changes once."""
        if self._base is None or self._base[0] is not received:
            self._base = received, {n: self._to_stack(n, t) for n, t in received.items()}
        return {n: t.unsqueeze(0).expand(clients, *t.shape) for n, t in self._base[1].items()}

    def stack(self, name: str, tensors: Tensor) -> Tensor:
        """Plain tensors [K, *shape] in the stack's layout."""
        if isinstance(self._slots[name][0], Linear):
            return tensors.transpose(1, 2).contiguous() if tensors.dim() == 3 else tensors.unsqueeze(1)
        return tensors

    def plain(self, name: str, tensors: Tensor) -> Tensor:
        """Stacked tensors as [K, *shape] of the plain model; a view where possible."""
        if isinstance(self._slots[name][0], Linear):
            return tensors.transpose(1, 2) if name.endswith("weight") else tensors.squeeze(1)
        return tensors

    def _to_stack(self, name: str, tensor: Tensor) -> Tensor:
        return self.stack(name, tensor.unsqueeze(0)).squeeze(0)
