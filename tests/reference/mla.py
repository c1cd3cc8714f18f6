"""MLA with a summed fusion, sample by sample and entry by entry; slow on purpose.

Where the paper is silent: means run over the samples of the batch that have the modality.
"""

import torch
from fedcmi import CE, linear, owned, phi


def r(p, data, i, m):
    return linear(p, f"fusion.linear.{m}", phi(p, m, data.x[m][i]))


def L_m(p, data, rows, m):
    here = [i for i in rows if m in owned(data, i)]
    return sum(CE(linear(p, "head.joint", r(p, data, i, m)), int(data.y[i])) for i in here) / max(len(here), 1)


def mean_r(p, data, rows, m):
    here = [i for i in rows if m in owned(data, i)]
    return sum(r(p, data, i, m).detach() for i in here) / len(here) if here else None


def advance(P, mean, a, outer=False):
    n = len(mean)
    k = [sum(P[i][j] * mean[j] for j in range(n)) for i in range(n)]
    scalar = sum(k[j] * mean[j] for j in range(n))
    new = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            new[i][j] = P[i][j] - k[i] * k[j] / (a + (k[i] * mean[j] if outer else scalar))
    return new / new.square().sum().sqrt()


def train(p, data, batches, lr, size, project=True, outer=False):
    """All batches, all turns, plain gradient descent; returns the weights."""
    P, seen = torch.eye(p["head.joint.weight"].shape[1], dtype=torch.float64), 0
    for rows in batches:
        for m in data.modalities:
            p = {n: t.detach().requires_grad_() for n, t in p.items()}
            loss = L_m(p, data, rows, m)
            used = list(p)
            if isinstance(loss, torch.Tensor):
                found = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
                g = {n: torch.zeros_like(p[n]) if d is None else d for n, d in zip(used, found, strict=True)}
                if project and len(data.modalities) > 1:
                    g["head.joint.weight"] = g["head.joint.weight"] @ P.T
                    P = advance(P, mean_r(p, data, rows, m), 0.1 ** (1 + (seen % size) / size), outer)
                p = {n: p[n].detach() - lr * g[n] for n in p}
        seen += len(rows)
    return {n: t.detach() for n, t in p.items()}
