"""The observatory of modality imbalance: what each modality knows, brings and learns, from sums that merge by adding.

    kind          what one client sums                                            what it says of modality m
    accuracy      confusion counts (`fedmm.metrics.local.evaluate`)               accuracy by own head, masked, probe
    discrepancy   true-class confidence s^m of its contribution to the logits     rho^m = s^m / mean of the others'
    coalitions    hits and losses of the prediction from each set S of modalities Shapley value of accuracy and loss
    gradients     norms and products of the encoder's joint and unimodal gradient norm, cosine
    losses        cross-entropies of its own head (without one: of it alone)      mean loss

A client calls `observe`; a server checks names and shapes by `observe_fields`, adds the reports up over clients and
calls `observed`. Nothing here changes the model; all sums are float64; an absent modality is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, pstdev
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmm.metrics.classification import accuracy
from fedmm.metrics.fields import Field, Fields, Sizes, evaluation_fields
from fedmm.metrics.local import evaluate, predict
from fedmm.metrics.shapley import coalition_sums, coalitions, fused, orders_of, shapley
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import true_class_confidence
from fedmm.objectives.ogm import contributions
from fedmm.types import ClientData, Tensors

Figures = dict[str, dict[str, dict[str, float]]]
"""Section -> quantity -> modality (or set of them, or definition) -> figure; what was not measured has no entry."""

ACCURACIES = ("head", "masked", "probe")

_DISCREPANCY = ("discrepancy", "discrepancy_count")
_GRADIENT = ("gradient_joint", "gradient_own", "gradient_dot", "gradient_cosine", "gradient_count")
_CHUNK = 128  # rows whose activations are held for a backward pass


@contextmanager
def _evaluating(model: MultimodalModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def accuracies(merged: Tensors, modalities: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy of each modality under each definition that was measured.

    Args:
        merged: Sum of the clients' `fedmm.metrics.local.evaluate` reports.
        modalities: In slot order.

    Returns:
        "head" (the modality's own head), "masked" (fused prediction, the others absent), "probe" (linear probe on
        training features) -> modality -> accuracy over the samples that have it.
    """
    tables = {kind: {m: merged.get(f"{kind}.{m}", torch.zeros(1, 1)) for m in modalities} for kind in ACCURACIES}
    return {kind: {m: accuracy(t) for m, t in of.items() if bool(t.any())} for kind, of in tables.items()}


def modality_gap(values: Mapping[str, float]) -> float:
    """Largest minus smallest figure of all modalities; nan without any."""
    return max(values.values()) - min(values.values()) if values else math.nan


def _accuracy_figures(merged: Tensors, modalities: Sequence[str], broadcast: Tensors) -> Figures:
    found = accuracies(merged, modalities)
    return {"accuracy": found, "modality_gap": {"accuracy": {k: modality_gap(v) for k, v in found.items() if v}}}


def discrepancy(model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
    """OGM's score of each modality: sum of softmax(z^m)_y over the samples that have every owned modality.

    Returns:
        "discrepancy.m", "discrepancy_count.m" (scalars) for each owned modality; empty for a single one. Source: Peng
        et al., CVPR 2022, s^m; z^m for any fusion is `fedmm.objectives.ogm.contributions`.
    """
    if len(data.modalities) < 2:
        return {}
    features = predict(model, data).features
    with _evaluating(model):
        logits = contributions(model, features, data.present)
    scores = true_class_confidence({m: z.to(torch.float64) for m, z in logits.items()}, data.present, data.y)
    count = torch.stack(list(data.present.values())).all(0).sum().to(torch.float64)
    summed = {f"discrepancy.{m}": score for m, score in zip(logits, scores, strict=True)}
    return summed | {f"discrepancy_count.{m}": count for m in logits}


def discrepancy_ratios(scores: Mapping[str, float]) -> dict[str, float]:
    """rho^m = s^m / (mean of the other modalities' s); 1: balance, above 1: m leads; empty for a single one.

    For two modalities the discrepancy ratio of OGM (Peng et al., CVPR 2022). The paper has no form for more: the mean
    of the others keeps 1 the mark of balance.
    """
    total, others = sum(scores.values()), len(scores) - 1
    return {m: s * others / max(total - s, 1e-8) for m, s in scores.items()} if others > 0 else {}


def _discrepancy_figures(merged: Tensors, modalities: Sequence[str], broadcast: Tensors) -> Figures:
    means = _means(merged, "discrepancy", "discrepancy_count", modalities)
    return {"discrepancy": {"confidence": means, "ratio": discrepancy_ratios(means)}}


def _coalition_figures(merged: Tensors, modalities: Sequence[str], broadcast: Tensors) -> Figures:
    if not (count := float(merged.get("coalition_count", 0.0))):
        return {}
    orders = orders_of(modalities, broadcast)
    hits = {mask: float(merged[f"coalition.{mask}"]) / count for mask in coalitions(orders)}
    gain = {mask: -float(merged[f"coalition_loss.{mask}"]) / count for mask in hits}
    brought = dict(zip(modalities, shapley(hits, orders), strict=True))
    shown = {m: float(merged.get(f"coalition_shown.{m}", 0.0)) for m in modalities}
    names = {mask: "+".join(m for j, m in enumerate(modalities) if mask >> j & 1) or "none" for mask in hits}
    return {
        "shapley": {
            "accuracy": brought,
            "loss_reduction": dict(zip(modalities, shapley(gain, orders), strict=True)),
            "accuracy_where_present": {m: brought[m] * count / n for m, n in shown.items() if n},
        },
        "coalition": {"accuracy": {names[mask]: v for mask, v in hits.items()}},
    }


def _coalition_fields(owned: Sequence[str], modalities: Sequence[str], size: Sizes, broadcast: Tensors) -> Fields:
    masks = coalitions(orders_of(modalities, broadcast))
    names = [f"{name}.{mask}" for mask in masks for name in ("coalition", "coalition_loss")]
    return dict.fromkeys(["coalition_count", *names, *(f"coalition_shown.{m}" for m in owned)], Field(()))


def _paired_fields(*names: str) -> Callable[[Sequence[str], Sequence[str], Sizes, Tensors], Fields]:
    """Scalars "name.m" of what compares modalities, and so needs two."""
    found = {name: Field((), signed=name in ("gradient_dot", "gradient_cosine")) for name in names}
    return lambda owned, *_: {f"{n}.{m}": field for m in owned if len(owned) > 1 for n, field in found.items()}


def gradients(model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
    """Size and agreement of the joint and the unimodal gradient of each encoder.

    g_joint^m and g_own^m are the gradients of the mean of CE(fused) and of CE(own head; without one, the fused
    prediction with the others absent) with respect to all parameters of encoder m, in evaluation mode, over the n^m
    samples that have m and something beside it: elsewhere there is no other modality to compete with.

    Returns:
        n^m times each figure of this client, so that sums over clients divided by the sum of n^m are means weighted by
        samples: "gradient_joint.m" (norm), "gradient_own.m" (norm), "gradient_dot.m", "gradient_cosine.m" (0 where a
        gradient vanishes), and "gradient_count.m" (n^m), for each owned modality; empty for a single one. They are
        means of clients' figures, not figures of the pooled gradient, which would need whole gradients sent. Source:
        the cosine over the whole encoder, MMPareto (Wei and Hu, ICML 2024).
    """
    if len(data.modalities) < 2:
        return {}
    several = torch.stack(list(data.present.values())).sum(0) > 1
    sums = _gradient_sums(model, data, several.nonzero().squeeze(1))
    report: Tensors = {}
    for m, (joint, own) in sums.items():
        n = (data.present[m] & several).sum().to(torch.float64)
        # Gradients of sums: their norm is n times the norm of the mean's, their product n^2 times.
        length, alone, dot = joint.norm(), own.norm(), joint @ own
        product = length * alone
        report[f"gradient_joint.{m}"], report[f"gradient_own.{m}"] = length, alone
        report[f"gradient_dot.{m}"] = dot / n.clamp(min=1)
        report[f"gradient_cosine.{m}"] = torch.where(product > 0, n * (dot / product).clamp(-1, 1), 0.0)
        report[f"gradient_count.{m}"] = n
    return report


def _gradient_sums(model: MultimodalModel, data: ClientData, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of the sums of joint and of own losses over `rows`, flat and float64, by modality."""
    encoders = {m: list(model.encoder[m].parameters()) for m in data.modalities}
    parameters = [p for block in encoders.values() for p in block]
    size = sum(p.numel() for p in parameters)
    total = [torch.zeros(size, dtype=torch.float64, device=rows.device) for _ in range(2)]
    with _evaluating(model), torch.enable_grad():
        for chunk in torch.split(rows, _CHUNK):
            batch = data.batch(chunk)
            out = model(batch.x, batch.present)
            alone = list(out.modality_logits.values())
            alone = alone or [fused(model, out.features, batch.present, [m]) for m in batch.x]
            joint = F.cross_entropy(out.logits, batch.y, reduction="sum")
            # A modality's own loss reaches its own encoder alone, and only where it is present: one backward pass
            # through the sum of all gives every encoder its own.
            own = torch.stack([F.cross_entropy(o, batch.y, reduction="sum") for o in alone]).sum()
            for at, loss in enumerate((joint, own)):
                parts = torch.autograd.grad(loss, parameters, retain_graph=at == 0)
                total[at] += torch.cat([g.flatten().to(torch.float64) for g in parts])
    flat = (torch.split(t, [sum(p.numel() for p in block) for block in encoders.values()]) for t in total)
    return dict(zip(encoders, zip(*flat, strict=True), strict=True))


def _gradient_figures(merged: Tensors, modalities: Sequence[str], broadcast: Tensors) -> Figures:
    kinds = ("joint", "own", "dot", "cosine")
    return {"gradient": {k: _means(merged, f"gradient_{k}", "gradient_count", modalities) for k in kinds}}


def own_losses(model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
    """Cross-entropy of each modality by itself: of its own head, or of the fused prediction with the others absent.

    Returns:
        "own_loss.m" (sum), "own_count.m" (samples that have m) for each owned modality.
    """
    out = predict(model, data)
    with _evaluating(model), torch.no_grad():
        alone = out.modality_logits or {m: fused(model, out.features, data.present, [m]) for m in out.features}
    report: Tensors = {}
    for m, logits in alone.items():
        losses = F.cross_entropy(logits.to(torch.float64), data.y, reduction="none")
        report[f"own_loss.{m}"] = torch.where(data.present[m], losses, 0.0).sum()
        report[f"own_count.{m}"] = data.present[m].sum().to(torch.float64)
    return report


def _loss_figures(merged: Tensors, modalities: Sequence[str], broadcast: Tensors) -> Figures:
    return {"loss": {"own": _means(merged, "own_loss", "own_count", modalities)}}


def _loss_fields(owned: Sequence[str], modalities: Sequence[str], size: Sizes, broadcast: Tensors) -> Fields:
    return {f"{name}.{m}": Field(()) for m in owned for name in ("own_loss", "own_count")}


def fairness(client_accuracies: Iterable[float]) -> dict[str, float]:
    """How evenly the model serves clients.

    Args:
        client_accuracies: One accuracy a client; clients without samples (nan) are left out.

    Returns:
        mean, std (over clients, divisor K), min, worst_decile: mean of the worst ceil(K / 10) clients; all nan without
        clients. Source: Li et al., "Fair resource allocation in federated learning", ICLR 2020 (worst 10 %).
    """
    ordered = sorted(a for a in client_accuracies if not math.isnan(a))
    if not ordered:
        return dict.fromkeys(("mean", "std", "min", "worst_decile"), math.nan)
    worst = ordered[: math.ceil(len(ordered) / 10)]
    return {"mean": fmean(ordered), "std": pstdev(ordered), "min": ordered[0], "worst_decile": fmean(worst)}


def _means(merged: Tensors, name: str, count: str, modalities: Sequence[str]) -> dict[str, float]:
    """Sums "name.m" over counts "count.m", where something was counted."""
    counts = {m: float(merged.get(f"{count}.{m}", 0.0)) for m in modalities}
    return {m: float(merged[f"{name}.{m}"]) / n for m, n in counts.items() if n}


class Observation(NamedTuple):
    """One kind of observation: what a client sums, what the sums are called, and what they say."""

    measure: Callable[[MultimodalModel, ClientData, Tensors], Tensors]
    fields: Callable[[Sequence[str], Sequence[str], Sizes, Tensors], Fields]
    figures: Callable[[Tensors, Sequence[str], Tensors], Figures]


OBSERVATIONS: Mapping[str, Observation] = MappingProxyType(
    {
        "accuracy": Observation(evaluate, lambda o, _, s, given: evaluation_fields(o, s, given), _accuracy_figures),
        "discrepancy": Observation(discrepancy, _paired_fields(*_DISCREPANCY), _discrepancy_figures),
        "coalitions": Observation(coalition_sums, _coalition_fields, _coalition_figures),
        "gradients": Observation(gradients, _paired_fields(*_GRADIENT), _gradient_figures),
        "losses": Observation(own_losses, _loss_fields, _loss_figures),
    }
)


def observe(model: MultimodalModel, data: ClientData, what: Iterable[str], broadcast: Tensors) -> Tensors:
    """Sums of one client for the chosen kinds of observation; merge over clients by adding.

    Args:
        model: The global model; left as it was.
        data: One split of the client.
        what: Keys of `OBSERVATIONS`.
        broadcast: "probe.m" [d+1, C] for probe accuracy, "permutations" [P, M] above `EXACT` modalities.
    """
    parts = (OBSERVATIONS[kind].measure(model, data, broadcast) for kind in what)
    return {name: tensor for part in parts for name, tensor in part.items()}


def observe_fields(
    what: Iterable[str], owned: Sequence[str], modalities: Sequence[str], size: Sizes, broadcast: Tensors
) -> Fields:
    """Names, shapes and signs of what `observe` reports for a client that owns `owned` of the model's modalities."""
    parts = (OBSERVATIONS[kind].fields(owned, modalities, size, broadcast) for kind in what)
    return {name: field for part in parts for name, field in part.items()}


def observed(merged: Tensors, modalities: Sequence[str], broadcast: Tensors | None = None) -> Figures:
    """Figures from merged reports of `observe`.

    Args:
        merged: Sum of the clients' reports.
        modalities: The model's, in slot order.
        broadcast: What the clients' `observe` was given.

    Returns:
        accuracy {head, masked, probe}, modality_gap {accuracy} of each definition, discrepancy {confidence, ratio},
        shapley {accuracy, loss_reduction} over all samples, so that they add up to what all modalities together gain
        over none, and {accuracy_where_present} over the samples that have m, coalition {accuracy} of "none", "m1",
        "m1+m2" ..., gradient {joint, own, dot, cosine}, loss {own}.
    """
    found: Figures = {}
    for kind in OBSERVATIONS.values():
        found |= kind.figures(merged, modalities, broadcast or {})
    measured = {section: {name: v for name, v in figures.items() if v} for section, figures in found.items()}
    return {section: figures for section, figures in measured.items() if figures}
