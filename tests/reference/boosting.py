"""AUG, sample by sample and symbol by symbol; slow on purpose.

phi^m, head j of modality m "head.m.boost.j", the last layer of all heads "head.joint". n: modality -> number of heads.
Logits are summed where the paper sums probabilities, as in its authors' code. Where the paper is silent: a sample
counts for the modalities that it has; confidences are compared on samples that have all, class by class.
"""

import tiny
import torch
from fedcmi import CE, linear, owned, phi, softmax

from fedmm import seeding
from fedmm.config.schema import BoostingConfig, ModelConfig
from fedmm.models import build_model
from fedmm.types import ModalitySpec

SLOTS, HIDDEN = 3, 5


def network(modalities, seed=0, slots=SLOTS, fuse="logits"):
    """A random model whose every bias is off zero and whose gates are as built."""
    config = ModelConfig(
        norm="none",
        features=tiny.FEATURES,
        width=7,
        fusion="late",
        unimodal_heads=True,
        boosting=BoostingConfig(slots=slots, hidden=HIDDEN, fuse=fuse),
    )
    built = build_model({m: ModalitySpec("vector", (tiny.DIMS,)) for m in modalities}, tiny.CLASSES, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if not name.endswith("open.weight"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return built.double()


def psi(p, m, j, u):
    return linear(p, "head.joint", torch.relu(linear(p, f"head.{m}.boost.{j}", u)))


def heads(p, data, i, m, n):
    u = phi(p, m, data.x[m][i])
    return [psi(p, m, j, u) for j in range(n)]


def soft_CE(o, target):
    return -(target * torch.log(softmax(o))).sum()


def eps(z, y, lam):
    """Equation 5 for one sample: the residual label, the whole ensemble, the previous heads."""
    if len(z) == 1:
        return CE(z[0], y)
    before = sum(z[:-1])
    one_hot = torch.nn.functional.one_hot(torch.tensor(y), len(before)).to(before.dtype)
    y_hat = one_hot - lam * one_hot * softmax(before).detach()
    return soft_CE(z[-1], y_hat) + CE(sum(z), y) + CE(before, y)


def released(z, y, lam):
    """The loss of the authors' code, four cross-entropies over a batch; z: logits [B, C] of each head."""
    total = 0.0
    for i in range(len(y)):
        t, before = int(y[i]), sum(o[i] for o in z[:-1])
        mass = torch.zeros_like(before)
        mass[t] = softmax(before)[t].detach()
        total = total + CE(sum(o[i] for o in z), t) + CE(before, t) + CE(z[-1][i], t) - lam * soft_CE(z[-1][i], mass)
    return total / len(y)


def L_SUB(p, data, rows, m, n, lam=0.5):
    rows = [i for i in rows if m in owned(data, i)]
    return sum(eps(heads(p, data, i, m, n), int(data.y[i]), lam) for i in rows) / len(rows)


def s(p, data, modalities, n, rows=None):
    """Confidence of each modality: mean over classes, on samples that have every modality."""
    scores = []
    for m in modalities:
        of_class = {}
        for i in range(len(data)) if rows is None else rows:
            if set(owned(data, i)) == set(modalities):
                truth = int(data.y[i])
                of_class.setdefault(truth, []).append(float(softmax(sum(heads(p, data, i, m, n[m])))[truth]))
        scores.append(sum(sum(v) / len(v) for v in of_class.values()) / len(of_class))
    return scores


def ACA(scores, sigma=1.0, tau=0.01):
    """Slots of the modalities that get a head."""
    if len(scores) == 2:
        a, v = scores
        return [0] if v - sigma * a > tau else [1] if a - sigma * v > tau else []
    return [i for i, one in enumerate(scores) if one / (sum(scores) - one) < 0.8 / (len(scores) - 1)]


def out(p, data, i, n):
    return sum(sum(heads(p, data, i, m, n[m])) for m in owned(data, i)) / len(owned(data, i))


def run(model, data, rounds, every, lr, size, seed, client=0):
    """The whole method on one machine, one epoch a round; (weights, heads)."""
    p = {n: t.detach().clone() for n, t in model.state_dict().items()}
    n = dict.fromkeys(data.modalities, 1)
    for t in range(rounds):
        # A decision rests on the weights as they are; the new head trains from the round after.
        grown = ACA(s(p, data, data.modalities, n)) if t and t % every == 0 else []
        order = torch.randperm(len(data), generator=seeding.torch_rng(seed, "batches", t + 1, client)).tolist()
        for start in range(0, len(data), size):
            for m in data.modalities:
                w = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
                loss = L_SUB(w, data, order[start : start + size], m, n[m])
                found = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
                p = {
                    name: tensor if g is None else tensor - lr * g
                    for (name, tensor), g in zip(p.items(), found, strict=True)
                }
        for slot in grown:
            m = data.modalities[slot]
            n[m] = min(n[m] + 1, 1 + len(p[f"head.{m}.open.weight"]))
    return p, n
