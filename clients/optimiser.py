"""SGD on stacks of clients: the arithmetic of `clients.trainer.sgd_step`, for each client's rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clients.trainer import LocalSchedule
from fedmm.models.stacked import Stack
from fedmm.types import Tensors

_VECTOR = 64
"""Numbers that the fused kernel handles at a time: only whole vectors round alike in a stack of any size."""


@dataclass(frozen=True)
class _Moving:
    """Weights and momenta that a step moves, made once for steps of the same clients and tensors."""

    names: tuple[str, ...]
    fused: list[str]
    fused_w: list[Tensor]
    fused_v: list[Tensor]
    others: list[str]
    others_w: list[Tensor]
    others_v: list[Tensor]


class StackedSGD:
    """The weights of a stack in training; until a tensor's first gradient, all clients share the received one.

    Args:
        stack: The model's stacked twin, to which the weights are bound.
        shared: Received tensors, the same for all clients, [K, ...] in the stack's layout (`Stack.expand_all`).
        trained: Names of the tensors that train.
        schedule: Rates.
    """

    def __init__(self, stack: Stack, shared: Tensors, trained: Sequence[str], schedule: LocalSchedule) -> None:
        self._stack = stack
        self._lr, self._momentum = schedule.lr, schedule.momentum
        self._decay, self._clip = schedule.weight_decay, schedule.clip
        self._w = {n: shared[n] for n in trained}
        self._fixed = {n: t for n, t in shared.items() if n not in self._w}
        self._v: Tensors = {}
        self._owned: set[str] = set()
        self._count = self._active = len(next(iter(shared.values())))
        self._bound: Tensors | None = None
        self._moving: _Moving | None = None

    def narrow(self, active: int) -> None:
        """Go on with the first `active` clients."""
        self._active, self._bound, self._moving = active, None, None
        self._stack.bind({n: w[:active] for n, w in self._fixed.items()})

    def show(self, rows: Tensor) -> None:
        """Bind the weights of some clients to the twin, to look at; `narrow` goes on."""
        self._stack.bind({n: t[rows] for n, t in (self._fixed | self._w).items()})

    def parameters(self) -> Tensors:
        """The active clients' tensors, as parameters of the twin."""
        if self._bound is None:
            self._bound = self._stack.bind({n: w[: self._active] for n, w in self._w.items()})
        return self._bound

    def weights(self) -> Tensors:
        """All trained tensors [K, ...]."""
        return dict(self._w)

    def step(self, gradients: Tensors) -> None:
        """One step of SGD with clipping, weight decay and momentum; tensors without gradient stay."""
        g = {n: t.contiguous() for n, t in gradients.items()}
        if self._clip is not None and g:
            # Products of each client's own numbers: a sum over rows is ordered by how many rows there are.
            flat = [t.flatten(1) for t in g.values()]
            norm = functools.reduce(torch.add, [torch.bmm(t[:, None], t[..., None])[:, 0, 0] for t in flat]).sqrt()
            scale = torch.clamp(self._clip / (norm + 1e-6), max=1.0)
            g = {n: t * scale.reshape(-1, *[1] * (t.dim() - 1)) for n, t in g.items()}
        if not self._owned.issuperset(g):
            fresh = {n: t for n, t in g.items() if n not in self._owned}
            self._diverge(fresh)
            g = {n: t for n, t in g.items() if n not in fresh}
        if not g:
            return
        if self._moving is None or self._moving.names != tuple(g):
            self._moving = self._rows(tuple(g))
        rows = self._moving
        if rows.fused:
            # One pass over weights, gradients and momenta instead of three. Contiguous tensors only: on others this
            # kernel writes to memory that is not theirs.
            torch._fused_sgd_(
                rows.fused_w,
                [g[n] for n in rows.fused],
                rows.fused_v,
                weight_decay=self._decay,
                momentum=self._momentum,
                lr=self._lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
        if rows.others:
            update = [g[n] for n in rows.others]
            if self._decay:
                update = list(torch._foreach_add(update, rows.others_w, alpha=self._decay))
            if self._momentum:
                torch._foreach_mul_(rows.others_v, self._momentum)
                torch._foreach_add_(rows.others_v, update)
                update = rows.others_v
            torch._foreach_add_(rows.others_w, update, alpha=-self._lr)

    def _rows(self, names: tuple[str, ...]) -> _Moving:
        """The active clients' part of tensors: contiguous, as clients come first."""
        fused = [n for n in names if self._momentum and self._w[n][0].numel() % _VECTOR == 0]
        others = [n for n in names if n not in set(fused)]

        def active(tensors: Tensors, which: list[str]) -> list[Tensor]:
            return [tensors[n][: self._active] for n in which]

        return _Moving(
            names,
            fused,
            active(self._w, fused),
            active(self._v, fused),
            others,
            active(self._w, others),
            active(self._v, others) if self._momentum else [],
        )

    def _diverge(self, gradients: Tensors) -> None:
        """The first step of some tensors: each client gets its own copy, and v <- g."""
        met: set[int] = set()
        for n, g in gradients.items():
            shared = self._w[n]
            update = g + self._decay * shared[: self._active] if self._decay else g
            self._w[n] = shared.contiguous() if self._active < self._count else torch.empty_like(g)
            torch.add(shared[: self._active], update, alpha=-self._lr, out=self._w[n][: self._active])
            if self._momentum:
                if self._active < self._count:
                    self._v[n] = update.new_zeros(self._w[n].shape)
                    self._v[n][: self._active] = update
                else:
                    # Autograd may hand one tensor to two parameters.
                    self._v[n] = update.clone() if update.data_ptr() in met else update
                    met.add(self._v[n].data_ptr())
        self._owned |= set(gradients)
        self._bound = self._moving = None
