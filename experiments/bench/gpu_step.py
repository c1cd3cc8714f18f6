"""One training step of a stack on fixed batches: as it is, compiled, and as a CUDA graph.

The engine uses neither of the last two: they are measured here to know what they would bring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from clients.trainer import LocalSchedule
from fedmm.data.federation import Pool
from fedmm.models.stacked import Stack
from fedmm.objectives import Objective
from fedmm.types import Batch, Presence, Tensors

WARM_UP = 3
"""Steps before a graph is captured, on a stream of their own, as PyTorch asks for."""


class StackStep:
    """Forward, backward and update of K clients, always on each client's first samples.

    Args:
        stack: The model's stacked twin, bound to this step's weights from now on.
        received: Weights to begin with, in the plain layout.
        objective: Local method with one loss and without state.
        pool: Samples of all clients, as many for each, on the device.
        count: Clients K.
        schedule: Rates and batch size.

    Attributes:
        weights: [K, ...] each, moved in place.
    """

    def __init__(
        self,
        stack: Stack,
        received: Tensors,
        objective: Objective,
        pool: Pool,
        count: int,
        schedule: LocalSchedule,
    ) -> None:
        self._stack, self._objective, self._schedule = stack, objective, schedule
        self.weights = {
            n: t.clone(memory_format=torch.contiguous_format) for n, t in stack.expand_all(received, count).items()
        }
        self._bound = stack.bind(self.weights)
        self._momenta = [torch.zeros_like(t) for t in self.weights.values()]
        self._rows = [p.detach() for p in self._bound.values()]
        size, width = int(pool.sizes[0]), min(schedule.batch_size, int(pool.sizes[0]))

        def first(samples: Tensor) -> Tensor:
            return samples[: count * size].view(count, size, *samples.shape[1:])[:, :width].contiguous()

        present = {m: first(p) for m, p in pool.present.items()}
        self._batch = Batch(
            {m: first(x) for m, x in pool.x.items()},
            Presence(present, frozenset(pool.x)),
            first(pool.y),
            torch.arange(width, device=pool.y.device).expand(count, width),
            torch.full((count, width), 1 / width, device=pool.y.device),
        )
        self._ones = torch.ones(count, device=pool.y.device)
        self.losses: Callable[[], Tensor] = self._losses

    def _losses(self) -> Tensor:
        (loss,) = self._objective.losses(self._stack.model, self._batch, {})
        return loss

    def __call__(self) -> None:
        """One step."""
        gradients = torch.autograd.grad(self.losses(), list(self._bound.values()), self._ones)
        s = self._schedule
        torch._foreach_mul_(self._momenta, s.momentum)
        torch._foreach_add_(self._momenta, [g.contiguous() for g in gradients])
        torch._foreach_add_(self._rows, self._momenta, alpha=-s.lr)


def compiled(step: StackStep, backend: str = "inductor") -> StackStep:
    """The step with its forward and backward pass compiled."""
    step.losses = torch.compile(step._losses, backend=backend)
    step()
    return step


def graphed(step: StackStep) -> Callable[[], None]:
    """The whole step as a CUDA graph that is replayed.

    Raises:
        RuntimeError: The device is no GPU, or the step does something that a graph cannot hold.
    """
    if step._ones.device.type != "cuda":
        raise RuntimeError("graphs are for GPUs")
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    return replay


FORMS: Mapping[str, Callable[[StackStep], Callable[[], object]]] = MappingProxyType(
    {"as it is": lambda step: step, "compiled": compiled, "CUDA graph": graphed}
)
"""Form -> from a step to what is called for one."""
