"""Whether clients train faster as stacks or one by one, found by timing a few real training steps.

Both give the same weights, to the last bit on a CPU (`clients/cohort.py`), so that nothing but time hangs on the
verdict. Stacks win by far on small models and lose where a single client fills the processor. Convolutions of many
channels, which on a CPU are left to PyTorch, round differently in a stack: there nothing is timed, so that every engine
and every repetition gives the same weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from clients.cohort import Member, train_stack
from clients.trainer import LocalSchedule, train
from clients.workspace import Workspace
from fedmm import native
from fedmm.data.federation import Pool
from fedmm.types import Tensors

SLOW_S = 0.2
"""A step of one client that takes longer fills the processor: there is nothing to gain, and a probe would take long."""

BUDGET_S = 0.2
"""What the comparison may take besides its first, unpaid laps."""

MEMORY = 2**31
"""Bytes of weights, gradients and momenta of a stack (2 GiB)."""

FASTER = 0.95
"""A stack must take at most this share of the time of one by one."""

_STATES = 3  # weights, gradients, momenta
_STEPS = 4
_LAPS = 4


@dataclass(frozen=True)
class Verdict:
    """How clients of a run train.

    Attributes:
        cohort: Clients in a stack; 1: one by one.
        largest: The size that was up for choice.
        seconds: Stack size -> seconds of one step of one client; empty if there was no choice.
        why: In a few words.
    """

    cohort: int
    largest: int
    seconds: Mapping[int, float] = field(default_factory=dict)
    why: str = ""

    def record(self) -> dict[str, Any]:
        """As plain values, for the manifest."""
        seconds = {str(size): float(f"{s:.3g}") for size, s in self.seconds.items()}
        return {"cohort": self.cohort, "largest": self.largest, "seconds_per_client_step": seconds, "why": self.why}

    def line(self) -> str:
        """As one line for the console."""
        how = f"in stacks of {self.cohort}" if self.cohort > 1 else "one by one"
        return f"clients train {how}: {self.why}"


def read_verdict(record: Mapping[str, Any], largest: int) -> Verdict | None:
    """The verdict that a manifest holds; None if it does not say, or was about another size."""
    try:
        found = Verdict(
            int(record["cohort"]),
            int(record["largest"]),
            {int(size): float(s) for size, s in record["seconds_per_client_step"].items()},
            str(record["why"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return found if found.largest == largest and found.cohort in (1, largest) else None


def probe(here: Workspace, largest: int, broadcast: Tensors | None = None) -> Verdict:
    """Time steps of one client and of a stack, and choose.

    Args:
        here: The workspace of the run.
        largest: Clients in a stack, if they are to be stacked.
        broadcast: Server knowledge as clients get it.
    """
    if largest < 2:
        return Verdict(1, largest, why="a round has too few clients for stacks")
    if here.stack is None:
        return Verdict(1, largest, why=here.why_alone)
    parameters = sum(p.numel() * p.element_size() for p in here.model.parameters())
    if (size := _STATES * parameters * largest) > MEMORY:
        return Verdict(1, largest, why=f"a stack's weights, gradients and momenta would take {size / 2**30:.1f} GiB")
    clients = alike(here.pool("train"), largest)
    if len(clients) < 2:
        return Verdict(1, largest, why="no two clients own the same modalities")
    if here.stack_for(1) is not here.stack:
        # Timing must not decide what rounds differently.
        if native.library is None:
            return Verdict(1, largest, why="without the compiled kernels (fedmm doctor) convolutions do not stack")
        return Verdict(1, largest, why=f"convolutions of up to {here.stack.channels} channels are faster one by one")
    once = step_seconds(here, clients[:1], broadcast, steps=1)
    if once > SLOW_S:  # a process's first step also loads what torch loads late
        once = step_seconds(here, clients[:1], broadcast, steps=1)
    if once > SLOW_S:
        return Verdict(1, largest, {1: once}, f"one step takes {once:.2f} s, so that there is nothing to gain")
    steps = max(1, min(_STEPS, int(BUDGET_S / 2 / (len(clients) * once))))
    best = {1: float("inf"), largest: float("inf")}
    began = perf_counter()
    for lap in range(_LAPS):
        for size in best:
            best[size] = min(best[size], step_seconds(here, clients[:size], broadcast, steps=steps))
        if perf_counter() - began > BUDGET_S * (lap + 1) / (lap + 2):  # another lap would pass the budget
            break
    ratio = best[1] / best[largest]
    if best[largest] <= FASTER * best[1]:
        return Verdict(largest, largest, best, f"{ratio:.1f} times as fast as one by one")
    return Verdict(1, largest, best, f"stacks of {largest} are {ratio:.2f} times as fast")


def alike(pool: Pool, most: int) -> list[int]:
    """The first clients, `most` at most, of the commonest kind: those that own the same modalities and have samples."""
    with_samples = [k for k, n in enumerate(pool.sizes) if n]
    kinds = Counter(pool.owned[k] for k in with_samples)
    commonest = kinds.most_common(1)[0][0]
    return [k for k in with_samples if pool.owned[k] == commonest][:most]


def step_seconds(here: Workspace, clients: Sequence[int], broadcast: Tensors | None = None, steps: int = 1) -> float:
    """Seconds that a step of one client takes when these clients, of one kind, train a few steps each.

    They train as a stack if the workspace has one for so many, else there must be one client only.

    Args:
        here: The workspace of the run.
        clients: Partition indices.
        broadcast: Server knowledge.
        steps: Steps a client, or fewer if it has no samples for so many.
    """
    t, seed = here.config.train, here.config.seed
    schedule = LocalSchedule(1, t.batch_size, t.lr, t.momentum, t.weight_decay, t.clip)
    pool = first_samples(here.pool("train"), clients, steps * t.batch_size)
    modalities = pool.owned[0]
    # Half-way: some objectives do something else in the first rounds.
    stack = here.stack_for(len(clients))
    rows = list(clients) if stack is not None else clients[0]
    sight = {n: v[rows] if n.startswith("client.") else v for n, v in (broadcast or {}).items()}
    sight = {n: v.to(here.device) for n, v in sight.items()}
    sight["round"] = torch.tensor(t.rounds // 2, device=here.device)
    received = {n: v.detach().clone(memory_format=torch.contiguous_format) for n, v in here.model.state_dict().items()}
    began = perf_counter()
    if stack is not None:
        members = [Member(i, schedule) for i in range(len(clients))]
        result = train_stack(stack, received, here.objective, pool, members, modalities, sight, seed, 1)
        done = int(result.steps.sum())
    else:
        model = here.load(received)
        done = train(model, here.objective, pool.client(0), modalities, sight, schedule, seed, 1, 0).steps
        here.load(received)
    return (perf_counter() - began) / max(done, 1)


def first_samples(pool: Pool, clients: Sequence[int], samples: int) -> Pool:
    """The first samples of some clients, as a federation of their own."""
    sizes = np.minimum(pool.sizes[list(clients)], samples)
    rows = torch.from_numpy(
        np.concatenate([pool.starts[k] + np.arange(n) for k, n in zip(clients, sizes, strict=True)])
    )
    return replace(
        pool,
        x={m: x[rows] for m, x in pool.x.items()},
        present={m: p[rows] for m, p in pool.present.items()},
        y=pool.y[rows],
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        owned=tuple(pool.owned[k] for k in clients),
    )
