"""G-Blend, sample by sample and symbol by symbol; slow on purpose."""

from cmsfed import out
from fedcmi import CE, H, owned, phi


def terms(p, data, rows, modalities):
    """{branch: CE of every sample that counts for it}."""
    found = {"fused": [CE(out(p, data, i, modalities), int(data.y[i])) for i in rows]}
    for m in data.modalities:
        found[m] = [CE(H(p, m, phi(p, m, data.x[m][i])), int(data.y[i])) for i in rows if m in owned(data, i)]
    return found


def mean(values):
    return sum(values) / len(values) if values else 0.0


def L(p, data, rows, modalities, held, w):
    used = [i for i in rows if i not in held]
    branches = terms(p, data, used, modalities)
    total = sum(w[k] for k in branches)
    return sum(w[k] / total * mean(values) for k, values in branches.items())


def ratio(before, after):
    """|G| / O^2 from pairs (T, V)."""
    (t_0, v_0), (t_1, v_1) = before, after
    overfitting, generalisation = (v_1 - t_1) - (v_0 - t_0), v_0 - v_1
    return abs(generalisation) / overfitting**2
