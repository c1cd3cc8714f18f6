"""OGM-GE on a concatenation head, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: scores are sums over the samples of the batch that have every given modality; of more than
two modalities each is compared with the smallest score, or with the sum of the others.
"""

import math

import torch
from cmsfed import out
from fedcmi import CE, owned, phi, softmax


def L(p, data, rows, modalities):
    return sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)


def z(p, data, i, m, modalities):
    """W_m h^m + b / M with W_m the columns of the head that read modality m."""
    W, b = p["head.joint.weight"], p["head.joint.bias"]
    width = W.shape[1] // len(modalities)
    first = modalities.index(m) * width
    return W[:, first : first + width] @ phi(p, m, data.x[m][i]) + b / len(data.modalities)


def k(p, data, rows, modalities, alpha, reference="smallest"):
    s = dict.fromkeys(data.modalities, 0.0)
    for i in rows:
        if len(owned(data, i)) == len(data.modalities):
            for m in data.modalities:
                s[m] += float(softmax(z(p, data, i, m, modalities))[int(data.y[i])])
    found = {}
    for m in s:
        others = [s[n] for n in s if n != m]
        compared = sum(others) if reference == "others" else min(others)
        leads = compared > 0 and s[m] / compared > 1
        found[m] = 1 - math.tanh(alpha * s[m] / compared) if leads else 1.0
    return found


def std(g):
    values = g.flatten().tolist()
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def edit(g, k_m, standard_normal=None):
    """k g + N(0, std(g)^2)."""
    edited = torch.empty_like(g)
    for j in range(g.numel()):
        noise = 0.0 if standard_normal is None else std(g) * standard_normal.flatten()[j]
        edited.view(-1)[j] = k_m * g.flatten()[j] + noise
    return edited
