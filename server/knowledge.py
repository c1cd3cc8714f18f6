"""What a server learns from replies besides the model: prototypes, imbalance, confidence, update directions.

An objective names the knowledge that it wants broadcast, a selector the knowledge that it decides by; a run keeps
exactly these. Each kind is one small class whose whole state is named tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmm.models.blocks import block_of, is_float
from fedmm.types import Tensors
from server.aggregation import Update, merge_reports


@dataclass(frozen=True)
class Federates:
    """Facts about the federation that knowledge and selection need.

    Attributes:
        modalities: Of the model, in slot order.
        owned: Modalities that each client owns, [K].
        samples: Training samples of each client, [K].
    """

    modalities: tuple[str, ...]
    owned: tuple[tuple[str, ...], ...]
    samples: tuple[int, ...]


class Knowledge:
    """Base of all kinds of knowledge.

    Class attributes:
        requests: Statistics wanted with each update.
        bootstrap: All clients must be asked once before the first round.
    """

    requests: ClassVar[frozenset[str]] = frozenset()
    bootstrap: ClassVar[bool] = False

    def __init__(self, federates: Federates) -> None:
        self.federates = federates
        self.tensors: Tensors = {}

    def broadcast(self) -> Tensors:
        """What is sent to clients with the model."""
        return {}

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Take in a round's admitted updates, sorted by client. `sent` is the model that they started from."""

    def metrics(self) -> dict[tuple[str, str], float]:
        """(modality or "fused", metric) -> value, for the round's record."""
        return {}


class Prototypes(Knowledge):
    """Global class prototypes C_c^m: class-count weighted mean of client prototypes, replaced each round (BMSFed).

    A class that no reply of the round has seen keeps its previous prototype.
    """

    requests = frozenset({"prototypes"})
    bootstrap = True

    def broadcast(self) -> Tensors:
        """Prototypes [C, d] and counts [C] of each modality (count 0: the class has no prototype yet)."""
        return {n: t.to(torch.float32) for n, t in self.tensors.items()}

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Average the updates' prototypes."""
        merged = merge_reports([u.report for u in updates])
        for m in self.federates.modalities:
            if f"prototype_sum.{m}" not in merged:
                continue
            total, count = merged[f"prototype_sum.{m}"], merged[f"prototype_count.{m}"]
            fresh = total / count.clamp(min=1).unsqueeze(1)
            old = self.tensors.get(f"prototype.{m}", torch.zeros_like(fresh))
            old_count = self.tensors.get(f"prototype_count.{m}", torch.zeros_like(count))
            self.tensors[f"prototype.{m}"] = torch.where((count > 0).unsqueeze(1), fresh, old)
            self.tensors[f"prototype_count.{m}"] = torch.where(count > 0, count, old_count)


class Imbalance(Knowledge):
    """Nearest-prototype accuracy of every client and modality, and the imbalance ratios made of it (BMSFed).

    b_k = acc_1 / acc_2 of the client's last reply; globally b = sum n_k b_k / sum n_k over all multimodal clients.
    Modality 1 dominates if b > 1. With more than two modalities: dominant and weak by n-weighted mean accuracy, and
    b_k = acc_dominant / acc_weak.
    """

    requests = frozenset({"prototypes"})
    bootstrap = True
    _FLOOR = 1e-3

    def __init__(self, federates: Federates) -> None:
        super().__init__(federates)
        shape = (len(federates.owned), len(federates.modalities))
        self.tensors = {"accuracy": torch.full(shape, torch.nan, dtype=torch.float64)}

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Note each client's accuracies."""
        accuracy = self.tensors["accuracy"].clone()
        for u in updates:
            for slot, m in enumerate(self.federates.modalities):
                if f"hits.{m}" in u.report:
                    shown = u.report[f"shown.{m}"].clamp(min=1)
                    accuracy[u.client, slot] = u.report[f"hits.{m}"] / shown
        self.tensors["accuracy"] = accuracy

    def order(self) -> tuple[int, int]:
        """Slots of the globally dominant and weak modality."""
        accuracy, n = self._known()
        if accuracy.shape[1] == 2:
            return (0, 1) if self.ratio(0, 1) > 1 else (1, 0)
        mean = (accuracy.nan_to_num() * n).sum(0) / (n * ~accuracy.isnan()).sum(0).clamp(min=1)
        return int(mean.argmax()), int(mean.argmin())

    def ratio(self, a: int, b: int) -> float:
        """Sum n_k acc_a / acc_b over clients that have both, divided by sum n_k; 1 if none has."""
        accuracy, n = self._known()
        ratios = accuracy[:, a].clamp(min=self._FLOOR) / accuracy[:, b].clamp(min=self._FLOOR)
        both = ~ratios.isnan()
        return float((ratios[both] * n[both, 0]).sum() / n[both, 0].sum()) if bool(both.any()) else 1.0

    def local_ratio(self, client: int, dominant: int, weak: int) -> float:
        """acc_dominant / acc_weak of one client; 1 for a client that lacks either."""
        a = self.tensors["accuracy"][client].clamp(min=self._FLOOR)
        value = float(a[dominant] / a[weak])
        return 1.0 if value != value else value

    def _known(self) -> tuple[Tensor, Tensor]:
        n = torch.tensor(self.federates.samples, dtype=torch.float64).unsqueeze(1)
        return self.tensors["accuracy"], n

    def metrics(self) -> dict[tuple[str, str], float]:
        """The global ratio, first to second modality (dominant to weak for more than two)."""
        if len(self.federates.modalities) == 2:
            return {("fused", "imbalance_ratio"): self.ratio(0, 1)}
        return {("fused", "imbalance_ratio"): self.ratio(*self.order())} if len(self.federates.modalities) > 2 else {}


class Confidence(Knowledge):
    """True-class probability a modality under the sent model; the largest mean names the dominant modality.

    Source: FedCMI's dominance, decided once a round for the federation (`round_global`).
    """

    requests = frozenset({"confidence"})

    def __init__(self, federates: Federates) -> None:
        super().__init__(federates)
        self.tensors = {"dominant": torch.tensor(-1)}

    def broadcast(self) -> Tensors:
        """The slot of the dominant modality, -1 before the first replies."""
        return dict(self.tensors)

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Compare the totals; without any, keep the last decision."""
        merged = merge_reports([u.report for u in updates])
        means = [
            float(merged[f"confidence.{m}"] / merged[f"confidence_count.{m}"].clamp(min=1))
            if f"confidence.{m}" in merged
            else float("-inf")
            for m in self.federates.modalities
        ]
        if max(means) > float("-inf"):
            self.tensors = {"dominant": torch.tensor(max(range(len(means)), key=means.__getitem__))}


Matrix = npt.NDArray[np.float64]


def distances(
    vectors: Tensor, normalise: bool = False, rows: Iterable[int] = (), known: Matrix | None = None
) -> Matrix:
    """Euclidean distances [K, K] between direction vectors [K, P], exact zeros on the diagonal.

    Args:
        vectors: One row a client.
        normalise: Scale rows to unit length first (an option, not the paper's).
        rows: With `known`: the clients whose vectors changed; only their rows and columns are computed.
        known: Distances before the change.
    """
    v = vectors.to(torch.float64)
    if normalise:
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-12)
    result = np.zeros((len(v), len(v))) if known is None else known.copy()
    for i in range(len(v)) if known is None else rows:
        # Differences instead of the Gram form: nearly equal directions must not come out as noise.
        row = (v - v[i]).square().sum(1).sqrt().numpy()
        result[i, :] = result[:, i] = row
    return result


class Directions(Knowledge):
    """Last update direction w - w_k of every client, decoupled by modality: the vectors of submodular selection.

    joint [K, P]: all encoder deltas, refreshed when a client trained all its modalities; a lacking modality gives
    zeros. encoder.<m> [K, P_m]: refreshed in the bootstrap, and then when the client trained m alone (a weak-only
    pick). whole [K, P']: deltas of all blocks (DivFL's own vectors). Clients that were not picked keep stale vectors.
    Source: BMSFed, section "selection"; DivFL (Balakrishnan et al., ICLR 2022).
    """

    bootstrap = True

    def __init__(self, federates: Federates) -> None:
        super().__init__(federates)
        # key, normalise -> the vectors that the distances belong to, the distances, rows that changed since
        self._distances: dict[tuple[str, bool], tuple[Tensor, Matrix, set[int]]] = {}

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Overwrite the vectors that the module's text says."""
        floats = {n: t for n, t in sent.items() if is_float(t)}
        if not self.tensors:
            self.tensors = {
                f"direction.{k}": torch.zeros(len(self.federates.owned), self._length(k, floats)) for k in self._keys()
            }
            first = True
        else:
            first = False
        for u in updates:
            for key in self._keys():
                # Sorted: a model that comes from a checkpoint lists its tensors in another order.
                mine = sorted(n for n in floats if self._covers(key, n))
                weak_only = key.startswith("encoder.")
                if (weak_only and (first or u.modalities == (key.removeprefix("encoder."),))) or (
                    not weak_only and u.complete
                ):
                    parts = [(floats[n] - u.model.get(n, floats[n])).flatten() for n in mine]
                    self.tensors[f"direction.{key}"][u.client] = torch.cat(parts)
                    for (cached, _), (_, _, stale) in self._distances.items():
                        if cached == key:
                            stale.add(u.client)

    def _keys(self) -> tuple[str, ...]:
        return ("joint", *[f"encoder.{m}" for m in self.federates.modalities])

    @staticmethod
    def _covers(key: str, name: str) -> bool:
        block = block_of(name)
        if key == "joint":
            return block.startswith("encoder.")
        return key == "whole" or block == key

    def _length(self, key: str, floats: Tensors) -> int:
        return sum(t.numel() for n, t in floats.items() if self._covers(key, n))

    def distances(self, key: str, normalise: bool = False) -> Matrix:
        """Distances [K, K] between `vectors(key)`; rows that did not change since the last call are not recomputed."""
        vectors = self.vectors(key)
        owner, known, stale = self._distances.get((key, normalise), (None, None, set[int]()))
        # Another tensor than before (a restored checkpoint): nothing is known of it.
        matrix = distances(vectors, normalise, sorted(stale), known if owner is vectors else None)
        self._distances[key, normalise] = (vectors, matrix, set())
        return matrix

    def vectors(self, key: str) -> Tensor:
        """Vectors [K, P] of "joint", "whole" or "encoder.<m>"."""
        return self.tensors[f"direction.{key}"]


class WholeDirections(Directions):
    """Last update direction of every client over all blocks: DivFL's vectors."""

    def _keys(self) -> tuple[str, ...]:
        return ("whole",)


KNOWLEDGE: Mapping[str, type[Knowledge]] = MappingProxyType(
    {
        "prototypes": Prototypes,
        "imbalance": Imbalance,
        "confidence": Confidence,
        "directions": Directions,
        "whole_directions": WholeDirections,
    }
)
