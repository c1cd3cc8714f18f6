"""Data Remixing, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: a sample is assigned among the modalities that it has, and of equals to the first.
"""

import math

import torch
from fedcmi import CE, linear, owned, phi, softmax


def head(p, m, h):
    return linear(p, f"head.{m}", h)


def D_KL_to_uniform(o):
    p = softmax(o).tolist()
    return sum(p_j * math.log(len(p) * p_j) for p_j in p)


def keep(p, data, i):
    return min(owned(data, i), key=lambda m: D_KL_to_uniform(head(p, m, phi(p, m, data.x[m][i]))))


def fused(p, z, modalities, features):
    """sum_m W_m z_m + b over the modalities of z (Eq. 5, 10)."""
    W, total = p["head.joint.weight"], p["head.joint.bias"]
    for slot, m in enumerate(modalities):
        if m in z:
            total = total + W[:, slot * features : (slot + 1) * features] @ z[m]
    return total


def L(p, data, rows, modalities, kept=None, weight=1.0, mask="skip"):
    """Eq. 1 (`kept` None: warm-up), or the loss of a batch whose samples i keep only kept[i]."""
    features = p["head.joint.weight"].shape[1] // len(modalities)
    total, own = 0.0, {m: [] for m in data.modalities}
    for i in rows:
        here = owned(data, i) if kept is None else [kept[i]]
        z = {m: phi(p, m, data.x[m][i]) for m in here}
        if mask == "input":
            z |= {m: phi(p, m, torch.zeros_like(data.x[m][i])) for m in owned(data, i) if m not in here}
        total = total + CE(fused(p, z, modalities, features), int(data.y[i])) / len(rows)
        for m in here:
            own[m].append(CE(head(p, m, z[m]), int(data.y[i])))
    return total + weight * sum(sum(terms) / len(terms) for terms in own.values() if terms)
