"""The order of a round's clients: which ones share a stack, and in which order their models are added.

It follows from the picks, the clients' sizes and the configured stack size alone, never from the number of workers or
from timing, so that every engine adds up the same tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedmm.config.schema import Config
from server.selection import Pick

_STACKS_AT_LEAST = 2
"""A round is cut into at least as many stacks, if it has the clients, so that two processes share it."""

_SMALLEST = 4


def cohort_size(config: Config) -> int:
    """Clients in a stack: the configured number, or fewer if a round has few clients."""
    if config.engine.cohort == "off":
        return 1
    size = config.engine.cohort_size
    while size > _SMALLEST and size * _STACKS_AT_LEAST > config.train.clients_per_round:
        size //= 2
    return size


def arrange(picks: Sequence[Pick], samples: Sequence[int], cohort: int) -> dict[int, int]:
    """Place of each client in the round's order: client -> 0, 1, ...

    Clients that train the same modalities come together, those with more samples first: stacks are then even, and
    the longest work is handed out first. Neighbouring stacks are dealt to in turn, so that they take equally long.

    Args:
        picks: The round's picks.
        samples: n_k of every client.
        cohort: Clients in a stack.
    """
    ordered = sorted(picks, key=lambda p: (p.modalities, -samples[p.client], p.client))
    places: dict[int, int] = {}
    for start in range(0, len(ordered), 2 * cohort):
        pair = ordered[start : start + 2 * cohort]
        hands: tuple[list[Pick], list[Pick]] = ([], [])
        for i, pick in enumerate(pair):
            turn = (i % 4) in (1, 2)
            first = len(hands[0]) < cohort and (not turn or len(hands[1]) >= len(pair) - cohort)
            hands[0 if first else 1].append(pick)
        for i, pick in enumerate(hands[0] + hands[1]):
            places[pick.client] = start + i
    return places
