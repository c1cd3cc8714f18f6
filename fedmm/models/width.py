"""Models of part of the width, for devices that cannot train all of it (HeteroFL: Diao et al., ICLR 2021).

A client of width share s holds the leading ceil(s n) of the n hidden units, or channels, of each encoder's first layer,
and as many times more in later layers as the whole model has; each of its tensors is the leading corner of the whole
model's. Features, fusion, projectors and heads are whole. The paper's scaler is left out: the normalisation that ends
an encoder fixes the features' length at any width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TypeAlias

import torch
from torch import Tensor

from fedmm.config.schema import ModelConfig
from fedmm.errors import ConfigError
from fedmm.models.multimodal import MultimodalModel, build_model
from fedmm.types import ModalitySpec, Tensors

Shapes: TypeAlias = Mapping[str, torch.Size]
"""Tensor name -> shape."""


def hidden_width(config: ModelConfig, share: float) -> int | None:
    """`model.width` of a device; None: the whole.

    Raises:
        ConfigError: `model.width` is not given, so that there is nothing to take a share of.
    """
    if share == 1:
        return None
    if config.width is None:
        raise ConfigError(
            f"a device trains {share:g} of the model's width, but each encoder has its own default width",
            where="model.width",
            remedy="set it, e.g. model.width=64, or leave devices' width at 1",
        )
    return ceil(share * config.width - 1e-9)


def build_narrow(
    specs: dict[str, ModalitySpec], classes: int, config: ModelConfig, width: int, seed: int, whole: MultimodalModel
) -> MultimodalModel:
    """The model of a device of some width.

    Raises:
        ConfigError: It is not a part of the whole model, as its layers are others.
    """
    model = build_model(specs, classes, config.model_copy(update={"width": width}), seed)
    mine, every = model.state_dict(), whole.state_dict()
    if mine.keys() != every.keys() or any(t.dim() != every[n].dim() for n, t in mine.items()):
        raise ConfigError(
            f"at width {width} the model has other layers than at width {config.width}",
            where="devices",
            remedy="choose model.features other than 8 x model.width for resnet18, or leave devices' width at 1",
        )
    return model


def shapes_of(model: MultimodalModel) -> dict[str, torch.Size]:
    """Shapes of all tensors."""
    return {n: t.shape for n, t in model.state_dict().items()}


def corner(tensors: Tensors, shapes: Shapes) -> Tensors:
    """The leading corners of the tensors that `shapes` names, contiguous; the others as they are."""
    return {n: t[_slices(shapes[n])].contiguous() if n in shapes else t for n, t in tensors.items()}


def padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor as the leading corner of zeros of `shape`; axes in front of those of `shape` are kept."""
    axes = tensor.shape[: tensor.dim() - len(shape)]
    if tensor.shape == (*axes, *shape):
        return tensor
    whole = tensor.new_zeros(*axes, *shape)
    whole[_slices(tensor.shape)] = tensor
    return whole


def held_mean(total: Tensor, holders: Sequence[tuple[torch.Size, float]], otherwise: Tensor) -> Tensor:
    """Entry by entry the mean over those who hold the entry, float64.

    Args:
        total: Sum of weight x padded tensor, float64.
        holders: Shape of the corner that each one holds, and its weight.
        otherwise: Of entries that nobody holds.
    """
    mass = torch.zeros_like(total)
    for shape, weight in holders:
        mass[_slices(shape)] += weight
    return torch.where(mass > 0, total / mass, otherwise.to(total.dtype))


def _slices(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)
