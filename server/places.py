"""The order of a round's clients: which ones share a stack, and in which order their models are added.

It follows from the picks, the clients' sizes and the configured stack size alone, never from the number of workers or
from timing, so that every engine adds up the same tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmm.config.schema import Config
from fedmm.trees import aligned
from server.selection import Pick

_STEP = 4.0
"""What a step costs whatever the number of clients in it, in units of what one client adds (measured on a CPU)."""

_FEW = 4
"""A stack for fewer clients is not worth a second process."""


def cohort_size(config: Config) -> int:
    """Most clients in a stack."""
    if config.engine.cohort == "off":
        return 1
    return min(config.engine.cohort_size, aligned(config.train.clients_per_round))


def arrange(picks: Sequence[Pick], samples: Sequence[int], cohort: int) -> dict[int, int]:
    """Place of each client in the round's order; places have gaps, as each stack begins at a multiple of `cohort`.

    Clients that train the same modalities come together, those with more samples first. The order is cut into an
    even number of stacks that take about equally long: few large clients make one, many small ones another. Stacks
    are spread over the places so that any half of them is half of the work: processes get aligned runs of places.

    Args:
        picks: The round's picks.
        samples: n_k of every client.
        cohort: Most clients in a stack, a power of two.
    """
    ordered = sorted(picks, key=lambda p: (p.modalities, -samples[p.client], p.client))
    stacks = -(-len(ordered) // cohort)
    if cohort > 1:
        stacks = max(stacks, min(2, len(ordered) // _FEW))
        stacks += stacks % 2 if stacks > 1 else 0
    sizes = [samples[p.client] for p in ordered]
    cuts = _cuts(sizes, stacks, cohort)
    parts = list(zip([0, *cuts], [*cuts, len(ordered)], strict=True))
    costs = [_STEP * sizes[start] + sum(sizes[start:stop]) for start, stop in parts if stop > start]
    return {
        ordered[i].client: slot * cohort + i - parts[stack][0]
        for stack, slot in _slots(list(range(len(costs))), costs).items()
        for i in range(*parts[stack])
    }


def _slots(stacks: list[int], costs: Sequence[float], first: int = 0) -> dict[int, int]:
    """Slot of each stack, such that every half of the slots, and every half of a half, costs about as much."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, first)
    halves: tuple[list[int], list[int]] = ([], [])
    room = -(-len(stacks) // 2)
    for stack in sorted(stacks, key=lambda s: (-costs[s], s)):
        totals = [sum(costs[s] for s in half) for half in halves]
        lighter = 0 if totals[0] <= totals[1] else 1
        halves[lighter if len(halves[lighter]) < room else 1 - lighter].append(stack)
    # A half with one stack more takes the larger run of slots.
    halves = halves if len(halves[0]) >= len(halves[1]) else (halves[1], halves[0])
    middle = first + aligned(len(stacks)) // 2
    return _slots(halves[0], costs, first) | _slots(halves[1], costs, middle)


def _cuts(sizes: Sequence[int], stacks: int, cohort: int) -> list[int]:
    """Where to cut the order into at most `stacks` stacks, so that the most expensive one is as cheap as can be."""
    low, high = 0.0, _STEP * max(sizes, default=0) * len(sizes) + sum(sizes)
    for _ in range(12):  # to a few thousandths
        bound = (low + high) / 2
        low, high = (bound, high) if _fill(sizes, bound, stacks, cohort) is None else (low, bound)
    return _fill(sizes, high, stacks, cohort) or []


def _fill(sizes: Sequence[int], bound: float, stacks: int, cohort: int) -> list[int] | None:
    """Cuts such that no stack costs more than `bound`, or None if that takes more than `stacks`."""
    cuts: list[int] = []
    start, longest, total = 0, 0, 0
    for i, size in enumerate(sizes):
        longest, total = max(longest, size), total + size
        if i > start and (i - start == cohort or _STEP * longest + total > bound):
            cuts.append(i)
            start, longest, total = i, size, size
    return cuts if len(cuts) < stacks else None
