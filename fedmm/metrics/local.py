"""What one client measures on its own data: sums and counts that merge over clients into the pooled figure.

All functions run the model in evaluation mode without gradients and leave its mode as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedmm import native
from fedmm.models.multimodal import MultimodalModel, evaluating
from fedmm.native.centres import add_hits, add_members
from fedmm.types import ClientData, Outputs, Presence, Tensors

_CHUNK = 512
"""Samples of a client that pass through a model at a time."""

_STACKED_CHUNK = 256
"""Most samples likewise of each client of a stack.

A chunk is that of the first clients, up to the last one that has samples in it: the others need not be filled up.
"""

_WORTH = 24
"""Samples of a client that are worth a chunk of their own; a stack's longer ones are in two at least."""


@torch.no_grad()
def predict(model: MultimodalModel, data: ClientData) -> Outputs:
    """Outputs for all N samples of a client, or of each client of a stack, in chunks (evaluation mode)."""
    axis = data.y.dim() - 1
    parts = []
    with evaluating(model):
        for start in range(0, max(len(data), 1), _CHUNK):
            size = min(_CHUNK, len(data) - start)
            x = {m: t.narrow(axis, start, size) for m, t in data.x.items()}
            parts.append(model(x, {m: p.narrow(axis, start, size) for m, p in data.present.items()}))
    if len(parts) == 1:
        return cast(Outputs, parts[0])
    return Outputs(
        torch.cat([p.logits for p in parts], -2),
        {m: torch.cat([p.features[m] for p in parts], -2) for m in parts[0].features},
        {m: torch.cat([p.modality_logits[m] for p in parts], -2) for m in parts[0].modality_logits},
        {m: torch.cat([p.infiltration_logits[m] for p in parts], -2) for m in parts[0].infiltration_logits},
    )


@torch.no_grad()
def own_logits(model: MultimodalModel, data: ClientData) -> Tensors:
    """Logits of the own heads [..., N, C] for all N samples, as `predict` gives them; zeros in rows that fill up."""
    found: Tensors = {}
    with evaluating(model):
        for some, rows in _chunks(data):
            at = (*some, rows)
            x = {m: t[at] for m, t in data.x.items()}
            present = Presence({m: t[at] for m, t in data.present.items()}, data.whole)
            if some and some[0].stop < len(data.y):
                own = {n: t[some] for n, t in model.named_parameters()}
                out = functional_call(model, own, (x, present), {"own_alone": True}, tie_weights=False)
            else:
                out = model(x, present, own_alone=True)
            for m, logits in out.modality_logits.items():
                found.setdefault(m, logits.new_zeros(*data.y.shape, logits.shape[-1]))[at] = logits
    return found


def class_sums(features: Tensor, present: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Per-class sum of features [..., C, d] and count of samples [..., C] that have the modality, float64.

    Args:
        features: [..., N, d].
        present: bool [..., N].
        y: Labels [..., N].
        classes: C.
    """
    member = (F.one_hot(y, classes) * present.unsqueeze(-1)).to(torch.float64)
    rows = torch.where(present.unsqueeze(-1), features, 0.0).to(torch.float64)
    return member.transpose(-1, -2) @ rows, member.sum(-2)


@dataclass(frozen=True)
class _Encoded:
    """Some rows of some clients.

    Attributes:
        clients: Which clients, in a stack.
        features: [..., M, n, d], finite in rows without the modality.
        y: Labels [..., n].
        present: bool [..., M, n].
    """

    clients: tuple[slice, ...]
    features: Tensor
    y: Tensor
    present: Tensor

    @property
    def natively(self) -> bool:
        """Whether the kernels can count it: of a stack."""
        return self.features.dim() > 3 and native.usable(self.features)

    def member(self, classes: int) -> Tensor:
        """1 for a sample that is of the class and has the modality, float64 [..., M, C, n]."""
        labels = torch.arange(classes, device=self.y.device).unsqueeze(-1)
        return ((self.y.unsqueeze(-2) == labels).unsqueeze(-3) & self.present.unsqueeze(-2)).to(torch.float64)

    def add_up(self, total: Tensor, count: Tensor) -> None:
        """Add to the sums [..., M, C, d] and counts [..., M, C] of classes, float64."""
        if self.natively:
            add_members(self.features, self.y, self.present, total, count)
            return
        member = self.member(count.shape[-1])
        total += member @ self.features.to(torch.float64)
        count += member.sum(-1)

    def add_hits(self, centres: Tensor, count: Tensor, hits: Tensor) -> None:
        """Add to hits [..., M] the samples that are nearest to their own class's centre, of those with members."""
        if self.natively:
            add_hits(self.features, self.y, self.present, centres, count, hits)
            return
        # ||h - C||^2 / 2 less what all classes share.
        offset = torch.where(count > 0, centres.square().sum(-1) / 2, torch.inf).unsqueeze(-1)
        near = (offset - centres @ self.features.to(torch.float64).mT).min(-2, keepdim=True).indices
        hits += self.member(count.shape[-1]).gather(-2, near).sum((-2, -1))


@torch.no_grad()
def _encoded(model: MultimodalModel, data: ClientData) -> list[_Encoded]:
    """What the encoders make of all samples, in chunks."""
    real = torch.ones_like(data.y, dtype=torch.bool) if data.real is None else data.real
    masked = [m for m in data.modalities if not torch.equal(data.present[m], real)]
    found = list[_Encoded]()
    with evaluating(model):
        for some, rows in _chunks(data):
            at, features = (*some, rows), list[Tensor]()
            for m in data.modalities:
                encoder, x = model.encoder[m], data.x[m][at]
                if m in masked:
                    here = data.present[m][at]
                    x = torch.where(here.reshape(*here.shape, *[1] * (x.dim() - here.dim())), x, 0.0)
                if some and some[0].stop < len(data.y):
                    own = {n: t[some] for n, t in encoder.named_parameters()}
                    features.append(functional_call(encoder, own, (x,), tie_weights=False))
                else:
                    features.append(encoder(x))
            present = torch.stack([data.present[m][at] for m in data.modalities], -2)
            found.append(_Encoded(some, torch.stack(features, -3), data.y[at].contiguous(), present))
    return found


def _chunks(data: ClientData) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Which clients, in a stack, and which of their rows."""
    if data.real is None:
        for start in range(0, len(data), _CHUNK):
            yield (slice(len(data.y)),) * (data.y.dim() - 1), slice(start, start + _CHUNK)
        return
    parts = max(1, min(2, len(data) // _WORTH), -(-len(data) // _STACKED_CHUNK))
    size = min(_STACKED_CHUNK, 8 * -(-len(data) // (8 * parts)))  # a multiple of 8, as any width (`clients.cohort`)
    clients = torch.arange(1, len(data.y) + 1, device=data.y.device).unsqueeze(1)
    for number, stop in enumerate((data.real[:, ::size] * clients).amax(0).tolist()):
        if stop:  # not rows that only fill up
            yield (slice(stop),), slice(number * size, (number + 1) * size)


def prototypes(model: MultimodalModel, data: ClientData) -> Tensors:
    """Class prototypes as sums and counts, and the hits of nearest-prototype classification on the same data.

    Returns:
        For each owned modality m: "prototype_sum.m" [..., C, d], "prototype_count.m" [..., C], "hits.m" and
        "shown.m" [...]: samples classified right by the client's own nearest prototype, and samples that have m.
        Source: BMSFed, imbalance ratio b_k = acc_1 / acc_2.
    """
    parts, shape = _encoded(model, data), (*data.y.shape[:-1], len(data.modalities), data.classes)
    total = parts[0].features.new_zeros(*shape, parts[0].features.shape[-1], dtype=torch.float64)
    count, hits = total.new_zeros(shape), total.new_zeros(shape[:-1])
    for part in parts:
        part.add_up(total[part.clients], count[part.clients])
    centres = total / count.clamp(min=1).unsqueeze(-1)
    for part in parts:
        part.add_hits(centres[part.clients], count[part.clients], hits[part.clients])
    report: Tensors = {}
    for slot, m in enumerate(data.modalities):
        report[f"prototype_sum.{m}"], report[f"prototype_count.{m}"] = total[..., slot, :, :], count[..., slot, :]
        report[f"hits.{m}"], report[f"shown.{m}"] = hits[..., slot], count[..., slot, :].sum(-1)
    return report


def confidence(model: MultimodalModel, data: ClientData) -> Tensors:
    """Sum of true-class probabilities of each modality's own head over samples that have all owned modalities.

    Returns:
        "confidence.m" and "confidence_count.m" [...] for each owned modality; empty without own heads or with a
        single modality. Source: FedCMI's s^m, summed for the federation-wide decision (`round_global`).
    """
    logits = predict(model, data).modality_logits
    if len(logits) < 2:
        return {}
    complete = torch.stack([data.present[m] for m in logits]).all(0)
    report: Tensors = {}
    for m, o in logits.items():
        truth = F.softmax(o.to(torch.float64), -1).gather(-1, data.y.unsqueeze(-1)).squeeze(-1)
        report[f"confidence.{m}"] = torch.where(complete, truth, 0.0).sum(-1)
        report[f"confidence_count.{m}"] = complete.sum(-1).to(torch.float64)
    return report


def moments(model: MultimodalModel, data: ClientData) -> Tensors:
    """Second moments of [h^m, 1] and its products with one-hot labels: enough for the pooled linear probe.

    Returns:
        "gram.m" [..., d+1, d+1] and "cross.m" [..., d+1, C], float64, over samples that have m.
    """
    report: Tensors = {}
    for m, h in predict(model, data).features.items():
        row = data.present[m].unsqueeze(-1)
        design = torch.where(row, torch.cat([h, torch.ones_like(h[..., :1])], -1), 0.0).to(torch.float64)
        report[f"gram.{m}"] = design.transpose(-1, -2) @ design
        report[f"cross.{m}"] = design.transpose(-1, -2) @ F.one_hot(data.y, data.classes).to(torch.float64)
    return report


def solve_probe(gram: Tensor, cross: Tensor, ridge: float = 1e-3) -> Tensor:
    """Ridge regression of one-hot labels on [h, 1]: probe weights [d+1, C] from pooled moments.

    Args:
        gram: Sum of outer products [d+1, d+1].
        cross: Sum of products with one-hot labels [d+1, C].
        ridge: Penalty relative to the mean feature variance; the bias is free.
    """
    d = gram.shape[0] - 1
    penalty = torch.full((d + 1,), float(ridge * (gram[:d, :d].diagonal().mean() + 1e-12)), dtype=gram.dtype)
    penalty[d] = 1e-9 * (gram[d, d] + 1e-12)
    weights: Tensor = torch.linalg.solve(gram + torch.diag(penalty), cross)
    return weights


def evaluate(model: MultimodalModel, data: ClientData, probes: Tensors) -> Tensors:
    """`evaluate_samples` without the losses of single samples."""
    return evaluate_samples(model, data, probes)[0]


@torch.no_grad()
def evaluate_samples(model: MultimodalModel, data: ClientData, probes: Tensors) -> tuple[Tensors, Tensor]:
    """Confusion counts and feature statistics of one split, which merge over clients by adding; losses of samples.

    Args:
        model: The global model.
        data: The client's validation or test split.
        probes: "probe.m" [d+1, C] for linear-probe accuracy, or empty.

    Returns:
        "confusion" [C, C] (rows: truth) of the fused prediction, "loss" (sum of cross-entropies), "count"; for each
        modality "masked.m" (fused prediction with all others absent), "head.m" (own head, if any), "probe.m" (if
        given), each [C, C], and "feature_sum.m", "feature_square.m" [d], "feature_count.m" (all float64). Beside it
        the cross-entropy of every sample, float64 [N].
    """
    out = predict(model, data)
    losses = F.cross_entropy(out.logits.to(torch.float64), data.y, reduction="none")
    report = {
        "confusion": confusion(out.logits, data.y, data.classes),
        "loss": losses.sum(),
        "count": torch.tensor(float(len(data)), dtype=torch.float64),
    }
    training = model.training
    model.eval()
    for m, h in out.features.items():
        here = data.present[m]
        alone = model.decide({m: h}, {m: here}).logits
        report[f"masked.{m}"] = confusion(alone[here], data.y[here], data.classes)
        if m in out.modality_logits:
            report[f"head.{m}"] = confusion(out.modality_logits[m][here], data.y[here], data.classes)
        if f"probe.{m}" in probes:
            w = probes[f"probe.{m}"]
            scores = h.to(torch.float64) @ w[:-1] + w[-1]
            report[f"probe.{m}"] = confusion(scores[here], data.y[here], data.classes)
        shown = h[here].to(torch.float64)
        report[f"feature_sum.{m}"], report[f"feature_square.{m}"] = shown.sum(0), shown.square().sum(0)
        report[f"feature_count.{m}"] = here.sum().to(torch.float64)
    model.train(training)
    return report, losses


def confusion(scores: Tensor, y: Tensor, classes: int) -> Tensor:
    """Counts [C, C] of (truth, prediction by the largest score), float64."""
    cells = torch.bincount(y * classes + scores.argmax(1), minlength=classes * classes)
    return cells.reshape(classes, classes).to(torch.float64)


STATISTICS: Mapping[str, Callable[[MultimodalModel, ClientData], Tensors]] = MappingProxyType(
    {"prototypes": prototypes, "confidence": confidence, "moments": moments}
)
"""Statistics that a server may ask of a client besides its update."""


def before_training(requests: Iterable[str], round: int) -> list[str]:
    """Those that describe the model as received: confidence, and in the bootstrap, which has no other model, all."""
    return [n for n in requests if n == "confidence" or round == 0]
