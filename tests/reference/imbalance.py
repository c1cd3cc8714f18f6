"""The figures of modality imbalance from their definitions, sample by sample; slow on purpose.

Models fuse by concatenation and have no projectors. Where the definitions are silent: a sample shows what it has of a
coalition; scores are means over the samples that have every owned modality; gradients are means over the samples that
have the modality and at least one more.
"""

import itertools
import math

import ogm
import torch
from fedcmi import CE, F, H, owned, phi, softmax


def fused(p, data, i, modalities, S):
    """The prediction when of all that sample i has only the modalities in S are present."""
    h = []
    for m in modalities:
        here = m in S and m in owned(data, i)
        h.append(phi(p, m, data.x[m][i]) if here else torch.zeros_like(p[f"encoder.{m}.3.bias"]))
    return F(p, h)


def v(p, data, modalities, S):
    """(accuracy, minus mean cross-entropy) of the coalition S."""
    hits, losses = 0, 0.0
    for i in range(len(data)):
        o, y = fused(p, data, i, modalities, S), int(data.y[i])
        hits += int(o.argmax()) == y
        losses += float(CE(o, y))
    return hits / len(data), -losses / len(data)


def coalitions(players):
    return [frozenset(S) for size in range(len(players) + 1) for S in itertools.combinations(players, size)]


def shapley(value, players):
    """phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S and i) - v(S))."""
    n, found = len(players), {}
    for i in players:
        found[i] = 0.0
        for S in coalitions([j for j in players if j != i]):
            weight = math.factorial(len(S)) * math.factorial(n - len(S) - 1) / math.factorial(n)
            found[i] += weight * (value[S | {i}] - value[S])
    return found


def confidence(p, data, modalities):
    """Mean softmax(z^m)_y of each owned modality."""
    rows = [i for i in range(len(data)) if len(owned(data, i)) == len(data.modalities)]
    return {
        m: sum(float(softmax(ogm.z(p, data, i, m, modalities))[int(data.y[i])]) for i in rows) / len(rows)
        for m in data.modalities
    }


def gradient_pair(p, data, m, modalities, own_heads):
    """Flat gradients of the joint and of the modality's own mean loss with respect to encoder m."""
    names = [n for n in p if n.startswith(f"encoder.{m}.")]
    rows = [i for i in range(len(data)) if m in owned(data, i) and len(owned(data, i)) > 1]
    found = []
    for kind in ("joint", "own"):
        loss = 0.0
        for i in rows:
            if kind == "joint":
                o = fused(p, data, i, modalities, modalities)
            elif own_heads:
                o = H(p, m, phi(p, m, data.x[m][i]))
            else:
                o = fused(p, data, i, modalities, [m])
            loss = loss + CE(o, int(data.y[i])) / len(rows)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p[n] for n in names])]))
    return len(rows), *found


def worst_decile(accuracies):
    worst = sorted(accuracies)[: -(-len(accuracies) // 10)]
    return sum(worst) / len(worst)
