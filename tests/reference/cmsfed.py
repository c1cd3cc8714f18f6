"""CMSFed / BMSFed's local side, sample by sample and symbol by symbol as in the paper; slow on purpose.

Where the paper is silent: a class without a prototype has no logit, and a modality without any prototype guesses;
samples that lack a modality count only for those that they have; the weak one of more than two modalities is the one
of the smallest sum.
"""

import math

import torch
from fedcmi import CE, linear, owned, phi, softmax


def out(p, data, i, modalities):
    """The concatenated encoder outputs, zeros for an absent modality, through the fusion classifier."""
    here = owned(data, i)
    some = phi(p, here[0], data.x[here[0]][i])
    z = [phi(p, m, data.x[m][i]) if m in here else torch.zeros_like(some) for m in modalities]
    return linear(p, "head.joint", torch.cat(z))


def distance(h, c):
    return torch.sqrt(sum((h[j] - c[j]) ** 2 for j in range(len(h))) + 1e-12)


def l(p, data, i, m, C):  # noqa: E743
    """l_c^m(x_i) = -||h - C_c||_2 over the classes that have a prototype: {c: logit}."""
    h = phi(p, m, data.x[m][i])
    return {c: -distance(h, C[m][c]) for c in C[m]}


def pce(p, data, i, m, C):
    logits = l(p, data, i, m, C)
    position = list(logits).index(int(data.y[i]))
    return CE(torch.stack(list(logits.values())), position)


def true_class_probability(p, data, i, m, C):
    logits = l(p, data, i, m, C)
    y = int(data.y[i])
    if y not in logits:
        return 0.0 if logits else 1 / data.classes
    return softmax(torch.stack(list(logits.values())))[list(logits).index(y)].item()


def weak_of(p, data, rows, C):
    sums = dict.fromkeys(data.modalities, 0.0)
    for i in rows:
        if len(owned(data, i)) == len(data.modalities):
            for m in data.modalities:
                sums[m] += true_class_probability(p, data, i, m, C)
    modalities = list(sums)
    if len(modalities) == 2:
        one, two = modalities
        return two if sums[one] > sums[two] else one
    return min(modalities, key=lambda m: (sums[m], modalities.index(m)))


def L_PCE(p, data, rows, m, C):
    terms = [pce(p, data, i, m, C) for i in rows if m in owned(data, i) and int(data.y[i]) in C[m]]
    return sum(terms) / len(terms) if terms else 0.0


def alignment(p, data, rows, m, C):
    terms = [
        distance(phi(p, m, data.x[m][i]), C[m][int(data.y[i])])
        for i in rows
        if m in owned(data, i) and int(data.y[i]) in C[m]
    ]
    return sum(terms) / len(terms) if terms else 0.0


def L(p, data, rows, modalities, C, *, alpha=2.0, variant="v2", beta=1.0, C_local=None, every=False):
    """Section 4.3; v1: local prototypes in L_PCE, and beta mean ||h^W - C_y^W|| to the global ones."""
    loss = sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)
    source = C_local if variant == "v1" else C
    enhanced = data.modalities if every else [weak_of(p, data, rows, source)]
    for m in enhanced:
        loss = loss + alpha * L_PCE(p, data, rows, m, source)
        if variant == "v1":
            loss = loss + beta * alignment(p, data, rows, m, C)
    return loss


def local_prototypes(p, data):
    """{m: {c: (mean feature, count)}} of one client, own modalities only."""
    found = {}
    for m in data.modalities:
        found[m] = {}
        for c in range(data.classes):
            h = [phi(p, m, data.x[m][i]) for i in range(len(data)) if int(data.y[i]) == c and m in owned(data, i)]
            if h:
                found[m][c] = (sum(h) / len(h), len(h))
    return found


def global_prototypes(clients, previous):
    """Mean of the clients' prototypes weighted by class counts; an unseen class keeps the previous prototype."""
    C = {m: dict(of) for m, of in previous.items()}
    for m in C:
        for c in {c for client in clients for c in client.get(m, {})}:
            total = sum(client[m][c][1] for client in clients if c in client.get(m, {}))
            C[m][c] = sum(client[m][c][1] / total * client[m][c][0] for client in clients if c in client.get(m, {}))
    return C


def accuracy(p, data, m):
    """acc_m: nearest own prototype on the client's training data."""
    prototypes = local_prototypes(p, data)[m]
    hits, shown = 0, 0
    for i in range(len(data)):
        if m in owned(data, i):
            h = phi(p, m, data.x[m][i])
            nearest = min(prototypes, key=lambda c: math.dist(h.tolist(), prototypes[c][0].tolist()))
            hits, shown = hits + (nearest == int(data.y[i])), shown + 1
    return hits / shown


def global_ratio(b, n):
    """b = sum n_k b_k / sum n_k over clients with a ratio."""
    known = [k for k in b if b[k] is not None]
    return sum(n[k] * b[k] for k in known) / sum(n[k] for k in known)
