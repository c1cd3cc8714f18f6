"""Which client owns which modality, and which samples lack one."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import numpy as np
import numpy.typing as npt


def owners(
    clients: int, modalities: Sequence[str], multimodal_share: float, rng: np.random.Generator
) -> list[tuple[str, ...]]:
    """Owned modalities of each client: floor(rK) clients own all, the others one each, evenly (the papers' ratio r).

    Args:
        clients: K.
        modalities: All modalities, in slot order.
        multimodal_share: r in [0, 1].
        rng: Decides which clients are which.
    """
    # The tiny addend undoes binary rounding: 0.29 * 100 must count as 29.
    complete = floor(multimodal_share * clients + 1e-9)
    order = rng.permutation(clients)
    owned: list[tuple[str, ...]] = [tuple(modalities)] * clients
    for turn, k in enumerate(order[complete:]):
        owned[k] = (modalities[turn % len(modalities)],)
    return owned


def drop_modalities(
    present: npt.NDArray[np.bool_], probability: float, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Each present modality of a sample is lost with `probability`, independently, but never a sample's last one.

    Args:
        present: What the sample has now, bool [N, M].
        probability: In [0, 1).
        rng: Source of all randomness.

    Returns:
        What is left, bool [N, M]. A sample that would lose everything keeps one of its modalities, chosen at random.
    """
    draw = rng.random(present.shape)
    kept = present & (draw >= probability)
    # The luckiest draw among the present modalities is a uniform choice.
    spared = np.where(present, draw, -1.0).argmax(axis=1)
    bare = np.flatnonzero(~kept.any(axis=1) & present.any(axis=1))
    kept[bare, spared[bare]] = True
    return kept
