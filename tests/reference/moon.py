"""MOON against an older global model, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: a sample's feature is that of the modalities that it has, zeros elsewhere.
"""

import torch
from cmsfed import out
from fedcmi import CE, owned, phi


def sim(u, v):
    return sum(u[j] * v[j] for j in range(len(u))) / (sum(u**2) ** 0.5 * sum(v**2) ** 0.5)


def z(p, data, i, modalities):
    return torch.cat([phi(p, m, data.x[m][i]) for m in modalities])


def l_con(p, p_glob, p_prev, data, i, modalities, tau):
    here = z(p, data, i, modalities)
    near = torch.exp(sim(here, z(p_glob, data, i, modalities)) / tau)
    far = torch.exp(sim(here, z(p_prev, data, i, modalities)) / tau)
    return -torch.log(near / (near + far))


def L(p, p_glob, p_prev, data, rows, modalities, mu, tau, level="joint"):
    loss = sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)
    if p_prev is None:
        return loss
    if level == "joint":
        terms = [l_con(p, p_glob, p_prev, data, i, owned(data, i), tau) for i in rows]
        return loss + mu * sum(terms) / len(terms)
    for m in data.modalities:
        terms = [l_con(p, p_glob, p_prev, data, i, [m], tau) for i in rows if m in owned(data, i)]
        loss = loss + mu * (sum(terms) / len(terms) if terms else 0.0)
    return loss
