"""The order of a round's clients: which ones share a stack, and in which order their models are added.

It follows from the picks, their work and the configured stack size alone, never from the number of workers or from
timing, so that every engine adds up the same tree.

    cost of a stack = STEP T max_k s_k + sum_k (P_k (CLIENT_STEP s_k + CLIENT) + M_k n_k)

over its clients k, which take s_k optimiser steps over n_k samples (epochs counted), train P_k numbers in T tensors
each, and multiply M_k times to pass a sample through their model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import Config
from fedmm.trees import aligned
from server.selection import Pick

_STEP = 2.17e6
"""What a step costs whatever the number of clients in it, for each tensor of the model, as the operations of a step
grow with them; in multiplications of a sample's forward pass. This and the next three are measured on a CPU."""

_CLIENT_STEP = 100.0
"""What a client adds to a step besides its samples: the update of its weights, and rows that fill up its batch; for
each number of its model."""

_CLIENT = 45.0
"""What a client costs besides its steps, chiefly its place in the sums; for each number of its model."""

_STACK = 3
"""What one more stack costs besides its clients and their steps, in steps."""

_FEW = 4
"""A stack for fewer clients is not worth a second process."""

_MANY = 8
"""So many stacks have even halves whatever each costs."""

_HALVINGS = 10

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        parameters: Numbers that a client trains.
        multiplications: In the forward pass of one sample.
        tensors: That a client trains.
    """

    parameters: int
    multiplications: int
    tensors: int


def cohort_size(config: Config) -> int:
    """Most clients in a stack."""
    if config.engine.cohort == "off":
        return 1
    return min(config.engine.cohort_size, aligned(config.train.clients_per_round))


def arrange(
    picks: Sequence[Pick],
    steps: Counts,
    samples: Counts,
    sizes: Mapping[tuple[str, ...], Size],
    cohort: int,
    *,
    halved: bool = True,
) -> dict[int, int]:
    """Place of each client in the round's order; places have gaps, as each stack begins at a multiple of `cohort`.

    Clients that train the same modalities come together, those with more steps first, and only they share a stack.
    The order is cut into stacks that take about equally long: few large clients make one, many
    small ones another. Stacks are spread over the places so that any half of them is half of the work: processes get
    aligned runs of places.

    Args:
        picks: The round's picks.
        steps: Optimiser steps of each.
        samples: Samples that each passes over, all epochs together.
        sizes: Of the model that clients train, by their modalities.
        cohort: Most clients in a stack, a power of two.
        halved: Make an even number of stacks; otherwise as few as there can be, for one device that does them all.
    """
    if not picks:
        return {}
    kinds = sorted({p.modalities for p in picks})
    kind = np.array([kinds.index(p.modalities) for p in picks])
    clients = np.array([p.client for p in picks])
    order = np.lexsort((clients, -samples, -steps, kind))
    kind, steps, samples = kind[order], steps[order], samples[order]
    every = [(sizes[k].parameters, sizes[k].multiplications, _STEP * sizes[k].tensors) for k in kinds]
    numbers, products, step = np.array(every)[kind].T
    own = numbers * (_CLIENT_STEP * steps + _CLIENT) + products * samples
    ends = np.searchsorted(kind, np.arange(len(kinds)), side="right")
    line = _Line(
        (step * steps).tolist(),
        list(accumulate(own.tolist(), initial=0.0)),
        np.minimum(np.arange(len(order)) + cohort, ends[kind]).tolist(),
    )
    stacks = int((-(-np.diff(ends, prepend=0) // cohort)).sum())
    counts = [stacks]
    if cohort > 1 and halved:
        stacks = max(stacks, min(2, len(picks) // _FEW))
        stacks += stacks % 2 if stacks > 1 else 0
        # A full stack cannot take what would make it as long as the others: two more may be worth their steps.
        counts = [stacks] if stacks == 1 else [stacks, stacks + 2]
    tried = [parts for count in counts for parts in line.cuts(count)]
    parts = min(tried, key=lambda found: line.longer_half(found) + step.max() * _STACK * len(found) / 2)
    slots = _slots(list(range(len(parts))), line.costs(parts))
    there = clients[order].tolist()
    return {
        there[i]: slot * cohort + i - parts[stack][0] for stack, slot in slots.items() for i in range(*parts[stack])
    }


Part = tuple[int, int]


class _Line:
    """Clients in order, to be cut into stacks.

    Args:
        lead: What the steps of a stack cost that begins with this client.
        totals: What all clients before this one cost by themselves; one entry more than clients.
        reach: Where a stack that begins with this client must end at the latest.
    """

    def __init__(self, lead: Sequence[float], totals: Sequence[float], reach: Sequence[int]) -> None:
        self._lead, self._totals, self._reach = lead, totals, reach

    def costs(self, parts: Sequence[Part]) -> list[float]:
        """Of each stack."""
        return [self._lead[start] + self._totals[stop] - self._totals[start] for start, stop in parts]

    def longer_half(self, parts: Sequence[Part]) -> float:
        """What the half that takes longer costs."""
        costs = self.costs(parts)
        return max(sum(costs[s] for s in half) for half in _halves(range(len(parts)), costs))

    def cuts(self, stacks: int) -> list[list[Part]]:
        """Ways to make at most `stacks` stacks; at most as many as their reach asks for, if that is more.

        The first has the cheapest most expensive stack. Of few stacks, where some are full, ways with a dearer one may
        have evener halves.
        """
        even = self._cut(stacks)
        if not 1 < len(even) <= _MANY:
            return [even]
        dearest = max(self.costs(even))
        return [even, *(self._fill(dearest * (1 + i / _MANY)) for i in range(1, _MANY // 2 + 1))]

    def _cut(self, stacks: int) -> list[Part]:
        low = max(self.costs([(i, i + 1) for i in range(len(self._lead))]), default=0.0)
        high = max(self._lead, default=0.0) + self._totals[-1]
        best = self._fill(high)
        if len(found := self._fill(low)) <= stacks:
            return found
        for _ in range(_HALVINGS):
            bound = (low + high) / 2
            found = self._fill(bound)
            low, high, best = (bound, high, best) if len(found) > stacks else (low, bound, found)
        return best

    def _fill(self, bound: float) -> list[Part]:
        """Stacks that cost no more than `bound`, but for clients who cost more alone."""
        parts, start = [], 0
        while start < len(self._lead):
            stop = bisect_right(self._totals, bound - self._lead[start] + self._totals[start]) - 1
            stop = max(start + 1, min(stop, self._reach[start]))
            parts.append((start, stop))
            start = stop
        return parts


def _slots(stacks: Sequence[int], costs: Sequence[float], first: int = 0) -> dict[int, int]:
    """Slot of each stack, such that every half of the slots, and every half of a half, costs about as much."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, first)
    halves = _halves(stacks, costs)
    middle = first + aligned(len(stacks)) // 2
    return _slots(halves[0], costs, first) | _slots(halves[1], costs, middle)


def _halves(stacks: Sequence[int], costs: Sequence[float]) -> tuple[list[int], list[int]]:
    """Two halves that cost about as much; of an odd number, the first has one more."""
    halves: tuple[list[int], list[int]] = ([], [])
    totals, room = [0.0, 0.0], -(-len(stacks) // 2)
    for stack in sorted(stacks, key=lambda s: (-costs[s], s)):
        lighter = 0 if totals[0] <= totals[1] else 1
        half = lighter if len(halves[lighter]) < room else 1 - lighter
        halves[half].append(stack)
        totals[half] += costs[stack]
    return halves if len(halves[0]) >= len(halves[1]) else (halves[1], halves[0])
