"""What a server learns from replies besides the model: prototypes, imbalance, confidence, update directions.

An objective names the knowledge that it wants broadcast, a selector the knowledge that it decides by; a run keeps
exactly these. Each kind is one small class whose whole state is named tensors. Update directions, the vectors of
submodular selection, have their own module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmm.types import Tensors
from server.aggregation import Update, merge_reports
from server.blending import Blend
from server.directions import Directions, WholeDirections, distances
from server.facts import Federates, Knowledge
from server.growth import Growth
from server.recency import Recency
from server.subspace import Subspace


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
        merged = merge_reports([{n: t for n, t in u.report.items() if n.startswith("prototype_")} for u in updates])
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
        for slot, m in enumerate(self.federates.modalities):
            with_m = [u for u in updates if f"hits.{m}" in u.report]
            if with_m:
                hits, shown = (torch.stack([u.report[f"{n}.{m}"] for u in with_m]) for n in ("hits", "shown"))
                accuracy[[u.client for u in with_m], slot] = hits / shown.clamp(min=1)
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

    def local_ratios(self, dominant: int, weak: int) -> npt.NDArray[np.float64]:
        """acc_dominant / acc_weak of every client, [K]; 1 for a client that lacks either."""
        a = self.tensors["accuracy"].clamp(min=self._FLOOR)
        found: npt.NDArray[np.float64] = (a[:, dominant] / a[:, weak]).nan_to_num(nan=1.0).numpy()
        return found

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


class Previous(Knowledge):
    """The encoders of the global model of the round before (the older model of a contrast, MOON)."""

    def broadcast(self) -> Tensors:
        """Tensors under their names in the model, behind "model."; nothing in the first round."""
        return dict(self.tensors)

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Keep what was sent."""
        self.tensors = {f"model.{n}": t for n, t in sent.items() if n.startswith("encoder.")}


KNOWLEDGE: Mapping[str, type[Knowledge]] = MappingProxyType(
    {
        "prototypes": Prototypes,
        "imbalance": Imbalance,
        "confidence": Confidence,
        "blend": Blend,
        "previous": Previous,
        "growth": Growth,
        "subspace": Subspace,
        "recency": Recency,
        "directions": Directions,
        "whole_directions": WholeDirections,
    }
)

__all__ = [
    "KNOWLEDGE",
    "Confidence",
    "Directions",
    "Federates",
    "Imbalance",
    "Knowledge",
    "Prototypes",
    "WholeDirections",
    "distances",
]
