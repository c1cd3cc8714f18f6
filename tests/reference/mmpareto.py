"""MMPareto on own heads, number by number; slow on purpose. The min-norm point is searched for, not solved."""

import math

import torch
from cmsfed import out
from fedcmi import CE, H, owned, phi


def L_0(p, data, rows, modalities):
    return sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)


def L_m(p, data, rows, m):
    terms = [CE(H(p, m, phi(p, m, data.x[m][i])), int(data.y[i])) for i in rows if m in owned(data, i)]
    return sum(terms) / len(terms) if terms else 0.0 * p[f"head.{m}.bias"].sum()


def dot(a, b):
    return sum(float(x * y) for x, y in zip(flat(a), flat(b), strict=True))


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).tolist()


def min_norm(g, u):
    """Ternary search of the a in [0, 1] that makes ||a g + (1 - a) u|| smallest."""
    gg, gu, uu = dot(g, g), dot(g, u), dot(u, u)

    def length(a):
        return a * a * gg + 2 * a * (1 - a) * gu + (1 - a) ** 2 * uu

    low, high = 0.0, 1.0
    for _ in range(200):
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, two) if length(one) < length(two) else (one, high)
    return (low + high) / 2


def integrate(joint, own, gamma, by_tensor=False):
    """Edited gradients of one encoder from {name: g_0} and {name: g_m}."""
    names = list(own)
    conflict = dot([joint[n] for n in names], [own[n] for n in names]) < 0
    found = {}
    for n in names:
        group = [n] if by_tensor else names
        a = min_norm([joint[k] for k in group], [own[k] for k in group]) if conflict else 0.5
        d = 2 * (a * joint[n] + (1 - a) * own[n])
        length, both = math.sqrt(dot([d], [d])), math.sqrt(dot([joint[n] + own[n]], [joint[n] + own[n]]))
        found[n] = gamma * (both / length if 0 < length < both else 1.0) * d
    return found
