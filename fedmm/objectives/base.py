"""What a client minimises: the contract of a local method, free of Flower and of the server.

Life of an objective in one round, on one client:

    state = begin(model, data, broadcast)                once; `model` holds the received global weights
    for each epoch:
        state |= renew(model, data, state)               from the second epoch on
        for each batch of batches(data, state, size, generator):
            for loss in losses(model, batch, step):      one optimiser step each; `step` begins as a copy of `state`
                gradients = edit_gradients(gradients of loss, parameters, step | noise(parameters, generator))
    report = end(model, data, state)                     once; sums and counts for the server

With `one_step` a batch has one optimiser step: the gradient of each loss is taken at the same weights, `combine`
makes one of them, and `edit_gradients` sees that one.

Two rules carry everything else:

1. No Python branch in `losses` may depend on data. Choose with masks and `torch.where`: then many clients train
   as one batched computation. Branching on which modalities a batch has is fine: it is fixed for a client.
2. State is tensors keyed by name: it can be stacked over clients, checkpointed and sent. Tensors whose name begins
   with "sample." have one row a training sample and are addressed with `batch.rows`. What `losses` finds and
   `edit_gradients` needs, `losses` adds to the state that it is given: it lives for one step. Tensors whose name
   begins with "kept." live on: `begin` makes them, and what a step puts in their place the next step finds. Server
   knowledge whose name begins with "model." has the shape of the model's tensor of that name; of what begins with
   "client.", which has one row a client at the server, each client is sent its own row.

An objective that sets `stacks` is also called with K clients at once. Then every tensor that it meets (model, data,
broadcast, batch, state, gradients, parameters) has a leading axis of K, and everything that it returns must have it
too. Shapes are therefore written [..., B, C]: reduce over samples with `batch.mean` and `masked_mean`, over classes
with -1, and never over all axes. Weights of linear layers are [K, in, out] in a stack, not [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedmm import native
from fedmm.metrics.fields import Fields, Sizes
from fedmm.models.blocks import modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class Objective:
    """Base of all local methods: subclasses are frozen dataclasses whose fields are the hyper-parameters.

    Class attributes:
        needs: Server knowledge that must be broadcast ("prototypes", "confidence"); see `server/knowledge.py`.
        requires: Model parts that must exist ("projector", "unimodal_heads", "boosting", "late_fusion").
        excludes: Model parts with which the method would not be what it says.
        least_modalities: Fewest modalities for which the method means anything.
        stacks: Whether K clients can be given at once (see the module's text); if not, they train one by one. Each
            class says so for itself: what a subclass changes may not know of stacks.
        alone: Why clients train one by one, where they do.
        one_step: Whether the losses of a batch share one optimiser step (see `combine`).
        acts: Kinds of what it does to one modality rather than to another; `actions` tells of them.
        skips: Why some steps give no gradient to tensors that other steps move, where it is so.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[frozenset[str]] = frozenset()
    least_modalities: ClassVar[int] = 1
    stacks: ClassVar[bool] = False
    alone: ClassVar[str] = ""
    one_step: ClassVar[bool] = False
    acts: ClassVar[frozenset[str]] = frozenset()
    skips: ClassVar[str] = ""

    @classmethod
    def stackable(cls) -> bool:
        """Whether this very class sets `stacks`."""
        return bool(vars(cls).get("stacks", False))

    def knowledge(self) -> frozenset[str]:
        """Server knowledge wanted with these hyper-parameters."""
        return self.needs

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """State of this round. `broadcast` has "round" (int64 scalar, from 0) and the server's knowledge."""
        return {}

    def renew(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """What changes in the state before each epoch but the first; `model` is the one in training.

        Of a stack it is given the clients whose epoch begins now.
        """
        return {}

    def batches(self, data: ClientData, state: Tensors, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches of one epoch, all modalities in each: a fresh permutation, the last batch at its true size."""
        for rows in torch.split(torch.randperm(len(data), generator=generator), size):
            yield data.batch(rows)

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """Losses [...] of a batch (a scalar for each client), one optimiser step each."""
        raise TypeError(f"{type(self).__name__} defines no losses")

    def noise(self, parameters: Tensors, generator: torch.Generator) -> Tensors:
        """Random tensors of one step, which `edit_gradients` finds in its state; `generator` is the client's own.

        Named and shaped like `parameters`, behind a prefix that ends in a dot: each client of a stack draws for itself.
        """
        return {}

    def combine(self, gradients: Sequence[Tensors], parameters: Tensors, state: Tensors) -> Tensors:
        """One gradient from those of the losses (`one_step`), here their sum; a pure function of named tensors."""
        names = dict.fromkeys(n for g in gradients for n in g)
        return {n: torch.stack([g[n] for g in gradients if n in g]).sum(0) for n in names}

    def edit_gradients(self, gradients: Tensors, parameters: Tensors, state: Tensors) -> Tensors:
        """Change the gradients of one step; a pure function of named tensors."""
        return gradients

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """What the method does in one step, for the observatory (`fedmm.objectives.watched`).

        Returns:
            "<kind>.<modality>" -> what is done to the modality, of every sample [..., B] or of the whole batch [...],
            0 or above; `state` is as `losses` left it. Not called unless somebody watches.
        """
        return {}

    def end(self, model: MultimodalModel, data: ClientData, state: Tensors) -> Tensors:
        """Sums and counts to report to the server with the update, float64; all named in `report_fields`."""
        return {}

    def report_fields(self, modalities: Sequence[str], size: Sizes) -> Fields:
        """What `end` reports for a client that trains `modalities`: the server refuses anything else."""
        return {}

    def trained_blocks(self, blocks: Iterable[str], modalities: Sequence[str]) -> tuple[str, ...]:
        """Blocks that a client moves when it trains `modalities`; the others are not sent and carry no weight."""
        return tuple(b for b in blocks if modality_of(b) is None or modality_of(b) in modalities)

    def optional_blocks(self, blocks: Iterable[str], modalities: Sequence[str]) -> tuple[str, ...]:
        """Those of `trained_blocks` that a client keeps back if no batch had their modality, or by `sent_blocks`."""
        return ()

    def sent_blocks(self, blocks: Iterable[str], report: Tensors) -> Tensors:
        """Which of its optional `blocks` a client sends, as its report says: block -> bool [...]; not named: sent."""
        return {}

    def uploads(self, modalities: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Sets of modalities of which a client that trains `modalities` sends one, and keeps the others back."""
        return (tuple(modalities),)


FEW_CLASSES = 32
"""Below this the library's cross-entropy, which goes row by row, leaves most of a vector register empty."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """CE of every sample, [..., B], from logits [..., B, C] and labels [..., B]."""
    if y.dim() > 1 and logits.shape[-1] < FEW_CLASSES and native.usable(logits):
        return cast(Tensor, _CrossEntropy.apply(logits, y))  # type: ignore[no-untyped-call]
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        """The losses."""
        labels = y.contiguous()
        losses, probabilities = native.cross_entropy(logits.contiguous(), labels)
        ctx.save_for_backward(probabilities, labels)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of the logits."""
        probabilities, labels = ctx.saved_tensors
        return native.cross_entropy_back(probabilities, labels, gradient.contiguous()), None


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` [..., B] where `mask` is True, [...]; 0 where it nowhere is. Exactly 0 gradient elsewhere."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def true_class(values: Tensor, y: Tensor) -> Tensor:
    """values[..., i, y_i]: [..., B] from [..., B, C]."""
    return values.gather(-1, y.unsqueeze(-1)).squeeze(-1)


def true_class_confidence(logits: Tensors, present: Tensors, y: Tensor) -> Tensor:
    """sum_i softmax(o^m)_{y_i} of each modality, [..., M], no gradient, over samples with every modality given.

    Restricting to complete samples keeps the ratio rho of two sums over the same samples.
    """
    complete = torch.stack([present[m] for m in logits]).all(0)
    rows = [(true_class(o.detach(), y) - o.detach().logsumexp(-1)).exp() for o in logits.values()]
    return torch.stack([torch.where(complete, p, 0.0).sum(-1) for p in rows], -1)


def per_client(scale: Tensor, tensor: Tensor) -> Tensor:
    """`scale` [...] shaped to multiply `tensor` [..., *shape], whose leading axes it has."""
    return scale.reshape(*scale.shape, *[1] * (tensor.dim() - scale.dim()))


def anchor(model: MultimodalModel) -> Tensors:
    """Copies of the received parameters, as state for the proximal term."""
    return {f"anchor.{name}": p.detach().clone() for name, p in model.named_parameters()}


def proximal(gradients: Tensors, parameters: Tensors, state: Tensors, mu: float) -> Tensors:
    """Add mu (w - w_hat), the gradient of (mu/2) ||w - w_hat||^2, to each trained tensor (FedProx, Li et al., 2020)."""
    return {n: g + mu * (parameters[n] - state[f"anchor.{n}"]) for n, g in gradients.items()}
