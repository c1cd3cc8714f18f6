"""FedCMI, sample by sample and symbol by symbol as in the paper; slow on purpose.

Parameters are one dictionary p of named tensors: phi^m "encoder.m" (two-layer MLP), S^m and I^m
"projector.m.self/infiltration", F "head.joint", H^m "head.m".

Where the paper is silent: a sample that lacks a modality counts like a uni-modal client's; of more than two
modalities the one of the largest sum is dominant and all others are weak, each pair with its own temperatures.
"""

import math

import torch


def linear(p, name, v):
    return p[f"{name}.weight"] @ v + p[f"{name}.bias"]


def phi(p, m, x):
    return linear(p, f"encoder.{m}.3", torch.relu(linear(p, f"encoder.{m}.1", x)))


def project(p, m, which, h, depth):
    z = h
    for layer in range(depth):
        z = linear(p, f"projector.{m}.{which}.{2 * layer}", z)
        if layer < depth - 1:
            z = torch.relu(z)
    return z


def S(p, m, h, depth):
    return project(p, m, "self", h, depth)


def I(p, m, h, depth):  # noqa: E743
    return project(p, m, "infiltration", h, depth)


def H(p, m, z):
    return linear(p, f"head.{m}", z)


def F(p, z):
    return linear(p, "head.joint", torch.cat(z))


def softmax(o):
    e = torch.exp(o - o.max())
    return e / e.sum()


def CE(o, y):
    return -torch.log(softmax(o)[y])


def owned(data, i):
    return [m for m in data.modalities if data.present[m][i]]


def out(p, data, i, modalities, depth):
    """F([z_S^1; ...]); the hole of an absent modality is filled with the (mean) infiltration feature."""
    here = owned(data, i)
    h = {m: phi(p, m, data.x[m][i]) for m in here}
    z = []
    for m in modalities:
        if m in here:
            z.append(S(p, m, h[m], depth))
        else:
            z_I = [I(p, j, h[j], depth) for j in here]
            z.append(sum(z_I) / len(z_I))
    return F(p, z)


def o_S(p, data, i, m, depth):
    return H(p, m, S(p, m, phi(p, m, data.x[m][i]), depth))


def o_I(p, data, i, m, depth):
    return H(p, m, I(p, m, phi(p, m, data.x[m][i]), depth))


def temperatures(p_hat, data, first, second, depth, kappa, first_leads=None):
    """tau_c of section 3.4 for one pair of modalities; `first_leads` overrules r_bar > 1 (round_global)."""
    r = {}
    for c in range(data.classes):
        s = {first: [], second: []}
        for i in range(len(data)):
            if int(data.y[i]) == c and first in owned(data, i) and second in owned(data, i):
                for m in (first, second):
                    s[m].append(softmax(o_S(p_hat, data, i, m, depth))[c].item())
        if s[first]:
            s_1 = max(sum(s[first]) / len(s[first]), 1e-6)
            s_2 = max(sum(s[second]) / len(s[second]), 1e-6)
            r[c] = s_1 / s_2
    tau = [1.0] * data.classes
    if not r:
        return tau
    r_bar = sum(r.values()) / len(r)
    for c, r_c in r.items():
        leads = r_bar > 1 if first_leads is None else first_leads
        R_c = r_c / r_bar if leads else (1 / r_c) / (1 / r_bar)
        tau[c] = 1 / (1 + kappa * math.log(R_c)) if R_c > 1 else 1.0
    return tau


def true_class_sums(p, data, rows, depth):
    """sum_i softmax(o_S^m)_{y_i} over the samples of the batch that have every owned modality."""
    sums = dict.fromkeys(data.modalities, 0.0)
    for i in rows:
        if len(owned(data, i)) == len(data.modalities):
            for m in data.modalities:
                sums[m] += softmax(o_S(p, data, i, m, depth))[int(data.y[i])].item()
    return sums


def dominant_of(sums):
    """rho > 1: the first; otherwise the other (two modalities); the largest sum in general."""
    modalities = list(sums)
    if len(modalities) == 2:
        one, two = modalities
        return one if sums[one] > sums[two] else two
    return max(modalities, key=lambda m: (sums[m], modalities.index(m)))


def L_CMI(p, p_hat, data, rows, depth, kappa, dominant=None, tau_off=False, teacher="global"):
    D = dominant if dominant is not None else dominant_of(true_class_sums(p, data, rows, depth))
    total = 0.0
    for W in data.modalities:
        if W == D:
            continue
        first, second = sorted((D, W), key=data.modalities.index)
        leads = None if dominant not in (first, second) else dominant == first
        tau = temperatures(p_hat, data, first, second, depth, kappa, leads)
        if tau_off:
            tau = [1.0] * data.classes
        terms = []
        for i in rows:
            if D in owned(data, i) and W in owned(data, i):
                t = tau[int(data.y[i])]
                with torch.no_grad():
                    q = softmax(o_S(p_hat if teacher == "global" else p, data, i, D, depth) / t)
                log_p = torch.log(softmax(o_I(p, data, i, W, depth) / t))
                terms.append(-sum(q[c] * log_p[c] for c in range(data.classes)))
        if terms:
            total = total + sum(terms) / len(terms)
    return total


def L(
    p,
    p_hat,
    data,
    rows,
    modalities,
    depth,
    *,
    lambda_1=2.0,
    lambda_2=1.0,
    kappa=2.0,
    mu=0.0,
    trained=None,
    dominant=None,
    tau_off=False,
    teacher="global",
):
    """Section 3.3 (3.5 for a client or sample of one modality); mu acts on the parameters named in `trained`."""
    loss = sum(CE(out(p, data, i, modalities, depth), int(data.y[i])) for i in rows) / len(rows)
    if len(data.modalities) > 1:
        for m in data.modalities:
            own = [
                CE(o_S(p, data, i, m, depth), int(data.y[i]))
                for i in rows
                if m in owned(data, i) and len(owned(data, i)) > 1
            ]
            if own:
                loss = loss + lambda_1 * sum(own) / len(own)
        if lambda_2:
            loss = loss + lambda_2 * L_CMI(p, p_hat, data, rows, depth, kappa, dominant, tau_off, teacher)
    for name in trained or ():
        loss = loss + mu / 2 * ((p[name] - p_hat[name]) ** 2).sum()
    return loss
