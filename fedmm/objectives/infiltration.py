"""FedCMI: Balanced Multi-modal Federated Learning via Cross-Modal Infiltration (Fan et al., arXiv 2401.00894).

The global dominant modality teaches the weak one through a second projector, so that what is specific to the weak
modality survives in its self projector.

    h = phi(x);  z_S = S(h);  z_I = I(h);  o_S = H(z_S);  o_I = H(z_I);  out = F([z_S^1; ...; z_S^M])
    L = CE(out, y) + lambda_self sum_m CE(o_S^m, y) + lambda_cmi L_CMI + (mu/2) ||w - w_hat||^2
    L_CMI = - mean_i sum_c q_ic log p_ic;  q_i = softmax(o_hat_S^D(x_i^D) / tau_y),  p_i = softmax(o_I^W(x_i^W) / tau_y)

o_hat: the received global model, frozen. D: the dominant modality, by the larger true-class probability, of the batch
under the local model (`batch_local`) or of the federation under the global model (`round_global`). Every other
modality is a student W. Class-wise temperature, from the received model on the local data before training:

    s_c^m = mean of softmax(o_S^m)_c over samples of class c;  r_c = s_c^1 / s_c^2;  r_bar = mean_c r_c
    R_c = r_c / r_bar if 1 dominates (r_bar > 1), else r_bar / r_c;  tau_c = 1 / (1 + kappa ln R_c) if R_c > 1, else 1

Samples with a single modality (and uni-modal clients) train CE(out, y) alone, the infiltration feature filling the
hole (see `MultimodalModel`).

State: teacher logits of every sample, tau for each pair of modalities, the weight of L_CMI, received weights. The
gradients of all terms but the first with respect to logits are written down, weight (softmax(o) - target) / tau.
Messages: none besides the model; `round_global` adds one confidence sum a modality up and one index down.
Differences from the paper: none in the equations. More than two modalities: one dominant, all others are students.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from fedmm.metrics.local import own_logits
from fedmm.models.blocks import modality_of
from fedmm.models.multimodal import MultimodalModel
from fedmm.objectives.base import Objective, anchor, cross_entropy, proximal, true_class
from fedmm.objectives.closed_form import hard, hard_slopes, mean_weights, soft, softmax, whole_weights, with_gradient
from fedmm.types import Batch, ClientData, Tensors


@dataclass(frozen=True)
class Infiltration(Objective):
    """FedCMI's local objective; each part can be switched off for ablation.

    Attributes:
        lambda_self: Weight of the self-branch cross-entropies (0: off).
        lambda_cmi: Weight of the infiltration loss (0: off).
        kappa: Steepness of the class-wise temperature.
        warmup_rounds: First round (from 0) with infiltration.
        prox_mu: Proximal strength (0: off).
        dominance: Who decides which modality teaches.
        temperature: "class_wise", or "off" for tau = 1.
        teacher: "global" (received model, frozen) or "local" (the model in training, no gradient; ablation).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"projector", "unimodal_heads"})
    least_modalities: ClassVar[int] = 2
    stacks: ClassVar[bool] = True
    acts: ClassVar[frozenset[str]] = frozenset({"guided"})
    lambda_self: NonNegativeFloat = 2.0
    lambda_cmi: NonNegativeFloat = 1.0
    kappa: NonNegativeFloat = 2.0
    warmup_rounds: NonNegativeInt = 1
    prox_mu: NonNegativeFloat = 0.0
    dominance: Literal["batch_local", "round_global"] = "batch_local"
    temperature: Literal["class_wise", "off"] = "class_wise"
    teacher: Literal["global", "local"] = "global"

    def knowledge(self) -> frozenset[str]:
        """`round_global` wants the federation's confidence a modality."""
        return frozenset({"confidence"}) if self.dominance == "round_global" else frozenset()

    def begin(self, model: MultimodalModel, data: ClientData, broadcast: Tensors) -> Tensors:
        """One pass of the received model over the local data: teacher logits and temperatures."""
        state = anchor(model) if self.prox_mu else {}
        names = data.modalities
        if len(names) < 2 or not self.lambda_cmi:
            return state
        warm = broadcast["round"] >= self.warmup_rounds
        # -1: each batch decides. The server speaks in slots of the whole model; translate to owned slots.
        dominant = broadcast.get("dominant", torch.full_like(broadcast["round"], -1))
        slots = torch.tensor([model.modalities.index(m) for m in names], device=dominant.device)
        found = slots == dominant.unsqueeze(-1)
        state["dominant"] = torch.where(found, torch.arange(len(names), device=dominant.device), -1).amax(-1)
        if bool(warm.any()):
            logits = own_logits(model, data)
        else:
            logits = {m: data.x[m].new_zeros(*data.y.shape, data.classes) for m in names}
        some = logits[names[0]]
        state["cmi_weight"] = warm.to(some.dtype) * self.lambda_cmi
        state["sample.teacher"] = torch.stack([logits[m] for m in names], -2)
        state["tau"] = pairwise_temperature(
            {m: softmax(logits[m]) for m in names},
            data.present,
            data.y,
            data.classes,
            self.kappa if self.temperature == "class_wise" else 0.0,
            state["dominant"],
        )
        return state

    def losses(self, model: MultimodalModel, batch: Batch, state: Tensors) -> tuple[Tensor, ...]:
        """The loss of the module's text; one optimiser step."""
        out = model(batch.x, batch.present)
        loss = batch.mean(cross_entropy(out.logits, batch.y))
        names = tuple(batch.x)
        if len(names) < 2:
            return (loss,)
        own, taught = ([o[m] for m in names if o] for o in (out.modality_logits, out.infiltration_logits))
        # All modalities side by side, [..., M, B, C]: as many operations as for one.
        with torch.no_grad():
            y = batch.y.unsqueeze(-2).expand(*batch.y.shape[:-1], len(names), -1).contiguous()
            here, alike = torch.stack([batch.present[m] for m in names], -2), whole_weights(batch, loss.dtype)
            logits = torch.stack(own, -3)
            each, p = hard(logits, y)
            share = here if alike is not None else here & (here.sum(-2, keepdim=True) > 1)
            weight = self.lambda_self * (mean_weights(share, loss.dtype) if alike is None else alike.unsqueeze(-2))
            weight = weight.expand(each.shape)
            value, slopes = (each * weight).sum((-2, -1)), [(hard_slopes(p, y, weight), own)]
            if self.lambda_cmi:
                dominant = _dominant((-each).exp(), here, state["dominant"])
                if self.teacher == "global":
                    teacher = batch.rows(state["sample.teacher"], dominant)
                else:
                    teacher = _entry(logits, dominant)
                term, slope = _infiltrate(torch.stack(taught, -3), teacher, dominant, y, here, alike, state)
                value, slopes = value + term, [*slopes, (slope, taught)]
        return (loss + with_gradient(value, *slopes),)

    def actions(self, batch: Batch, state: Tensors) -> Tensors:
        """Where each modality is a student, once the warm-up is over."""
        if "guided" not in state:
            return {}
        guided = state["guided"] & (state["cmi_weight"] > 0)[..., None, None]
        return {f"guided.{m}": rows for m, rows in zip(batch.x, guided.unbind(-2), strict=True)}

    def edit_gradients(self, gradients: Tensors, parameters: Tensors, state: Tensors) -> Tensors:
        """Add the proximal term, if any."""
        return proximal(gradients, parameters, state, self.prox_mu) if self.prox_mu else gradients

    def trained_blocks(self, blocks: tuple[str, ...], modalities: tuple[str, ...]) -> tuple[str, ...]:  # type: ignore[override]
        """As the base, except that a uni-modal client does not touch its own head H^m (no self loss there)."""
        trained = super().trained_blocks(blocks, modalities)
        if len(modalities) > 1:
            return trained
        return tuple(b for b in trained if not (b.startswith("head.") and modality_of(b)))


def _dominant(truth: Tensor, here: Tensor, known: Tensor) -> Tensor:
    """Slot [...] of the modality that leads: by the federation's verdict, if it is not -1, else by the batch.

    Args:
        truth: softmax(o_S^m)_y [..., M, B].
        here: Presence [..., M, B]; samples that lack a modality do not count.
        known: The federation's verdict [...].
    """
    sums = torch.where(here.all(-2, keepdim=True), truth, 0.0).sum(-1)
    # A tie makes the last modality dominant, as rho > 1 is strict for the first.
    local = sums.shape[-1] - 1 - sums.flip(-1).argmax(-1)
    return torch.where(known >= 0, known, local)


def _infiltrate(
    taught: Tensor, teacher: Tensor, dominant: Tensor, y: Tensor, here: Tensor, alike: Tensor | None, state: Tensors
) -> tuple[Tensor, Tensor]:
    """L_CMI times its weight, [...], and its gradient with respect to the infiltration logits.

    Args:
        taught: o_I^m [..., M, B, C].
        teacher: o_hat_S^D [..., B, C].
        dominant: D [...].
        y: Labels [..., M, B].
        here: Presence [..., M, B].
        alike: Weights of all samples' means [..., B], where no sample lacks a modality.
        state: The objective's; is told who is a student.
    """
    tau = _entry(state["tau"], dominant).gather(-1, y)
    # - sum_c q_c log p_c with q and p of the module's text.
    q = hard(teacher.unsqueeze(-3) / tau.unsqueeze(-1), y)[1]
    cross, p = soft(taught / tau.unsqueeze(-1), q)
    others = (torch.arange(y.shape[-2], device=y.device) != dominant.unsqueeze(-1)).unsqueeze(-1)
    if alike is None:
        state["guided"] = here & others & _entry(here, dominant).unsqueeze(-2)
        weight = mean_weights(state["guided"], cross.dtype)
    else:
        state["guided"], weight = here & others, others * alike.unsqueeze(-2)
    weight = weight * state["cmi_weight"][..., None, None]
    return (cross * weight).sum((-2, -1)), (p - q) * (weight / tau).unsqueeze(-1)


def _entry(tensor: Tensor, slot: Tensor) -> Tensor:
    """Entries [..., *rest] at the slots [...] of a tensor [..., M, *rest]."""
    axis, rest = slot.dim(), tensor.shape[slot.dim() + 1 :]
    at = slot.reshape(*slot.shape, 1, *[1] * len(rest)).expand(*slot.shape, 1, *rest)
    return tensor.gather(axis, at).squeeze(axis)


def pairwise_temperature(
    probabilities: Tensors, present: Tensors, y: Tensor, classes: int, kappa: float, dominant: Tensor
) -> Tensor:
    """Class-wise temperatures tau [..., M, M, C] of every (teacher, student) pair of modalities.

    Args:
        probabilities: Modality -> softmax(o_S^m) [..., N, C] of the received model on the local training data.
        present: Modality -> bool [..., N]; only samples with both modalities of a pair count.
        y: Labels [..., N].
        classes: C.
        kappa: Steepness; 0 gives tau = 1.
        dominant: Slot [...] of the federation's dominant modality, or -1: then the local mean ratio r_bar decides.

    Returns:
        Entries in (0, 1], symmetric in the pair; 1 for absent classes and where the weak modality lags no more than
        average.
    """
    names = tuple(probabilities)
    some = probabilities[names[0]]
    zero = some.new_zeros(*y.shape[:-1], classes)
    tau = some.new_ones(*y.shape[:-1], len(names), len(names), classes)
    for a, first in enumerate(names):
        for b in range(a + 1, len(names)):
            both = present[first] & present[names[b]]
            count = zero.scatter_add(-1, y, both.to(zero.dtype))
            s = []
            for m in (first, names[b]):
                truth = torch.where(both, true_class(probabilities[m], y), 0.0)
                s.append((zero.scatter_add(-1, y, truth) / count.clamp(min=1)).clamp(min=1e-6))
            here = count > 0
            r = torch.where(here, s[0] / s[1], 1.0)
            # Without any class in common r is 1 everywhere, and so is its mean.
            met = here | ~here.any(-1, keepdim=True)
            mean = torch.where(met, r, 0.0).sum(-1, keepdim=True) / met.sum(-1, keepdim=True)
            leader = dominant.unsqueeze(-1)
            first_leads = torch.where(leader == a, True, torch.where(leader == b, False, mean > 1))
            relative = torch.where(first_leads, r / mean, mean / r)
            pair = torch.where(here & (relative > 1), 1 / (1 + kappa * relative.clamp(min=1).log()), 1.0)
            tau[..., a, b, :] = tau[..., b, a, :] = pair
    return tau
