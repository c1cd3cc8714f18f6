"""What training a model costs a device: floating-point operations and bytes of memory, measured on one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmm.engines.devices import Precision
from fedmm.models.blocks import serves
from fedmm.models.multimodal import MultimodalModel, evaluating
from fedmm.types import ModalitySpec, Tensors

TRAINING_FACTOR = 3
"""Training over inference: the backward pass forms the gradients of inputs and of weights, each as dear as the
forward pass (Kaplan et al., 2020, section 2.1)."""

BYTES: Mapping[Precision, int] = MappingProxyType({"float32": 4, "bfloat16": 2})


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that training holds at once.

    Attributes:
        parameters: Weights and buffers of the blocks that the modalities need.
        gradients: One number a weight.
        momentum: One number a weight, or 0 without momentum.
        activations: What the forward pass of one batch keeps for the backward pass, inputs among it.
    """

    parameters: int
    gradients: int
    momentum: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.parameters + self.gradients + self.momentum + self.activations


def training_flops(model: MultimodalModel, specs: Mapping[str, ModalitySpec], modalities: Sequence[str]) -> int:
    """Operations of one training sample: three times those of the forward pass's matrix products and convolutions.

    A multiplication with its addition counts two; biases, norms and activations, a few per cent, are left out.
    Objectives that pass a sample through the model more than once cost as many times more.

    Args:
        model: As the device trains it.
        specs: Modality -> spec.
        modalities: Those that are trained.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        model(*_sample(model, specs, modalities))
    return TRAINING_FACTOR * counter.get_total_flops()


def multiplications(model: MultimodalModel, specs: Mapping[str, ModalitySpec], modalities: Sequence[str]) -> int:
    """Multiplications of linear layers and convolutions in the forward pass of one sample.

    Products elsewhere are left out: `training_flops` has them, whose counter takes a second to load.

    Args:
        model: As it is trained.
        specs: Modality -> spec.
        modalities: Those that are trained.
    """
    found = [0]

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        found[0] += output.numel() * cast(Tensor, layer.weight)[0].numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(*_sample(model, specs, modalities))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


def training_memory(
    model: MultimodalModel,
    specs: Mapping[str, ModalitySpec],
    modalities: Sequence[str],
    batch_size: int,
    precision: Precision = "float32",
    *,
    momentum: bool = True,
) -> MemoryNeed:
    """Bytes that training on batches of `batch_size` holds, all floating-point numbers in `precision`.

    Activations are the distinct tensors that autograd saves; workspace of the kernels is left out.

    Args:
        model: As the device trains it.
        specs: Modality -> spec.
        modalities: Those that the device owns.
        batch_size: Samples a batch.
        precision: Number format.
        momentum: Whether the optimiser keeps momentum.
    """
    held = {n: t for n, t in model.state_dict().items() if serves(n, modalities)}
    trained = sum(p.numel() for n, p in model.named_parameters() if n in held) * BYTES[precision]
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one storage, such as a flattened image, are one piece of memory.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with evaluating(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(*_sample(model, specs, modalities))
    for tensor in model.state_dict().values():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    # What is kept is the storage: all of it, even for a view of a part, and once for a tensor expanded from it.
    sizes = [(t, t.untyped_storage().nbytes() // t.element_size()) for t in kept.values()]
    activations = sum(_bytes(t, numbers, precision) for t, numbers in sizes)
    del output  # until here, so that no saved tensor's memory is used again
    return MemoryNeed(
        sum(_bytes(t, t.numel(), precision) for t in held.values()),
        trained,
        trained if momentum else 0,
        batch_size * activations,
    )


def _bytes(tensor: Tensor, numbers: int, precision: Precision) -> int:
    """Bytes of `numbers` of a tensor's kind, floating-point ones in `precision`."""
    return numbers * (BYTES[precision] if tensor.is_floating_point() else tensor.element_size())


def _sample(
    model: MultimodalModel, specs: Mapping[str, ModalitySpec], modalities: Sequence[str]
) -> tuple[Tensors, Tensors]:
    """One sample with the given modalities, in slot order, where the model is and in its number format."""
    names, one = [m for m in specs if m in modalities], next(model.parameters())
    x = {m: torch.zeros(1, *specs[m].shape, device=one.device, dtype=one.dtype) for m in names}
    return x, {m: torch.ones(1, dtype=torch.bool, device=one.device) for m in names}
