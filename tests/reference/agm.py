"""AGM on a concatenation head, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: scores are means over the samples of the batch that have every given modality; of more than
two modalities each is compared with the mean of the others; contributions are averages over all orders of arrival.
"""

import math
from itertools import permutations

import torch
from fedcmi import CE, linear, owned, phi


def f(p, data, i, S, modalities):
    """The fused logits of sample i with the modalities of S alone; nothing gives 0."""
    if not S:
        return torch.zeros_like(p["head.joint.bias"])
    h = {m: phi(p, m, data.x[m][i]) for m in S}
    nothing = torch.zeros_like(h[next(iter(h))])
    return linear(p, "head.joint", torch.cat([h.get(m, nothing) for m in modalities]))


def shapley(p, data, i, m, modalities):
    """Mean over all orders of what m adds on its arrival."""
    orders = list(permutations(data.modalities))
    gained = [
        f(p, data, i, {*o[: o.index(m)], m}, modalities) - f(p, data, i, set(o[: o.index(m)]), modalities)
        for o in orders
    ]
    return sum(gained) / len(orders)


def two(p, data, i, a, v, modalities):
    """(f(a, v) - f(0, v) + f(a, 0)) / 2."""
    both, only_v, only_a = (f(p, data, i, S, modalities) for S in ({a, v}, {v}, {a}))
    return (both - only_v + only_a) / 2


def s(p, data, rows, modalities):
    """{m: mean CE of its contribution}, or None without a complete sample."""
    complete = [i for i in rows if len(owned(data, i)) == len(data.modalities)]
    if not complete:
        return None
    return {
        m: sum(float(CE(shapley(p, data, i, m, modalities), int(data.y[i])).detach()) for i in complete) / len(complete)
        for m in data.modalities
    }


def ratio(scores, m):
    others = [v for n, v in scores.items() if n != m]
    return math.exp(sum(others) / len(others) - scores[m])


def factors(history, alpha, cap):
    """Of the last scores in the history, which has those of all batches so far."""
    mean = {m: sum(scores[m] for scores in history) / len(history) for m in history[0]}
    return {m: math.exp(alpha * min(ratio(mean, m) - ratio(history[-1], m), cap)) for m in mean}
