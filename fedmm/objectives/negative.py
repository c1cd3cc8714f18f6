"""MNL: Multimodal Negative Learning (Gong et al., arXiv 2510.20877).

For each sample the surer modality teaches the less sure ones only what the answer is not, so that nothing specific to
them is overwritten.

    P^m  = softmax(o^m);  xi^m = o^m_y - o^m_j                      j: the strongest wrong class (margin, UCoM)
    g    = the modality with both the largest P^m_y and the largest xi^m; they disagree: nobody teaches this sample
    MNL  = - sum_{c != y} P^g_c log P^m_c                           for m != g; P^g without gradient, not renormalised
    L    = CE(out, y) + sum_m CE(o^m, y) + lambda / (M - 1) mean_i sum_{m != g} MNL

The last term is added after a warm-up. Unguided samples stay in its mean.

State: whether the warm-up is over; for `guide: global` the received model's logits of every sample.
Messages: none besides the model.
`out` is the model's fused prediction: with `fusion: late` the mean of the branches' logits, as in the paper.
Differences from the paper: more than two modalities: one guide a sample, which must win both criteria against each. A
sample counts for the modalities that it has. `reduction: code` with `extra` is the loss of the authors' code: MNL plus
a cross-entropy on the guided branch, over the number of classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor
from torch.nn import functional as F

from fedmm.metrics.local import predict
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, cross_entropy, masked_mean, true_class
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class Negative(Objective):
    """MNL's local objective.

    Attributes:
        lambda_negative: Weight of the negative-learning loss (0: off).
        warmup_rounds: First round (from 0) with guidance.
        competitor: The wrong class of the margin: the best of the fused prediction, or of each modality's own.
        guide: "local" (the model in training) or "global" (the received model, frozen) decides and teaches.
        reduction: "paper" (sum over classes) or "code" (mean over classes).
        extra: Add the cross-entropy of the guided modality on the samples where it is guided (the authors' code).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"unimodal_heads"})
    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"guided"})
    lambda_negative: NonNegativeFloat = 0.7
    warmup_rounds: NonNegativeInt = 4
    competitor: Literal["fused", "per_modality"] = "fused"
    guide: Literal["local", "global"] = "local"
    reduction: Literal["paper", "code"] = "paper"
    extra: bool = False

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """The warm-up's switch, and for `guide: global` one pass of the received model over the local data."""
        if len(data.modalities) < 2:
            return {}
        warm = broadcast["round"] >= self.warmup_rounds
        state = {"guidance": warm.to(next(iter(data.x.values())).dtype)}
        if self.guide == "global":
            out = predict(model, data)
            state |= {"sample.fused": out.logits}
            state |= {f"sample.guide.{m}": o for m, o in out.modality_logits.items()}
        return state

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        loss = batch.mean(cross_entropy(out.logits, batch.y))
        for m, logits in out.modality_logits.items():
            loss = loss + masked_mean(cross_entropy(logits, batch.y), batch.present[m])
        if len(batch.x) < 2:
            return (loss,)
        fused, judged = out.logits, out.modality_logits
        if self.guide == "global":
            fused = batch.rows(state["sample.fused"])
            judged = {m: batch.rows(state[f"sample.guide.{m}"]) for m in batch.x}
        guide, guided = guidance(judged, fused, batch.present, batch.y, per_modality=self.competitor == "per_modality")
        state |= {f"guided.{m}": rows for m, rows in guided.items()}
        term = batch.mean(self.negative_loss(out.modality_logits, guide, guided, batch.y))
        return (loss + state["guidance"] * term,)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """Where each modality is guided, once the warm-up is over."""
        return {n: rows & (state["guidance"] > 0).unsqueeze(-1) for n, rows in state.items() if n.startswith("guided.")}

    def negative_loss(self, logits: Tensors, guide: Tensor, guided: Tensors, y: Tensor) -> Tensor:
        """The guided term of each sample, lambda / (M - 1) sum_m MNL, [..., B], from what `guidance` gives."""
        wrong = 1 - F.one_hot(y, guide.shape[-1]).to(guide.dtype)
        total = torch.zeros_like(guide[..., 0])
        for m, o in logits.items():
            term = -(wrong * guide * F.log_softmax(o, -1)).sum(-1) * self.lambda_negative / (len(logits) - 1)
            if self.extra:
                term = term + cross_entropy(o, y)
            total = total + torch.where(guided[m], term, 0.0)
        return total / guide.shape[-1] if self.reduction == "code" else total


def guidance(
    logits: Tensors, fused: Tensor, present: Tensors, y: Tensor, *, per_modality: bool = False
) -> tuple[Tensor, Tensors]:
    """The guide's probabilities of each sample, and the modalities that it teaches; no gradient.

    Args:
        logits: Modality -> logits of its own head [..., B, C].
        fused: Fused logits [..., B, C], which name the competitor of the true class.
        present: Modality -> bool [..., B]; absent modalities neither teach nor learn.
        y: Labels [..., B].
        per_modality: Each modality names its own competitor.

    Returns:
        P^g [..., B, C], meaningful where anyone is guided, and modality -> bool [..., B], where it is guided. The
        guide wins both criteria strictly: a tie in one of them guides nobody.
    """
    names = tuple(logits)
    o = torch.stack([logits[m].detach() for m in names])
    here = torch.stack([present[m] for m in names])
    truth = F.one_hot(y, o.shape[-1]).bool()
    votes = o if per_modality else fused.detach().expand_as(o)
    competitor = votes.masked_fill(truth, -torch.inf).argmax(-1)
    label = y.expand_as(competitor)
    p = o.softmax(-1)
    confidence = torch.where(here, true_class(p, label), -torch.inf)
    margin = torch.where(here, true_class(o, label) - true_class(o, competitor), -torch.inf)
    first = confidence.argmax(0, keepdim=True)
    wins = (confidence.gather(0, first) > confidence) & (margin.gather(0, first) > margin) & here
    agree = (first == margin.argmax(0, keepdim=True)).squeeze(0)
    guide = p.gather(0, first.unsqueeze(-1).expand(1, *p.shape[1:])).squeeze(0)
    return guide, {m: agree & wins[slot] for slot, m in enumerate(names)}
