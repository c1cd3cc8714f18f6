"""PMR, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: scores are sums over the samples of the batch that have every given modality; of more than
two modalities the smallest is slow and the largest fast.
"""

import torch
from cmsfed import L_PCE, l, local_prototypes, out, true_class_probability
from fedcmi import CE, owned, softmax


def renewed(old, p, data, memory):
    """(1 - mu) new + mu old."""
    new = local_prototypes(p, data)
    return {m: {c: (1 - memory) * new[m][c][0] + memory * old[m][c] for c in new[m]} for m in new}


def centres(p, data):
    return {m: {c: mean for c, (mean, _) in of.items()} for m, of in local_prototypes(p, data).items()}


def scores(p, data, rows, C):
    complete = [i for i in rows if len(owned(data, i)) == len(data.modalities)]
    return {m: sum(true_class_probability(p, data, i, m, C) for i in complete) for m in data.modalities}


def H(o):
    return -sum(q * torch.log(q) for q in softmax(o))


def L(p, data, rows, modalities, C, alpha=1.0, entropy=0.0):
    loss = sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)
    if len(data.modalities) < 2:
        return loss
    s = scores(p, data, rows, C)
    slower, faster = min(s, key=s.get), max(s, key=s.get)
    loss = loss + alpha * L_PCE(p, data, rows, slower, C)
    shown = [i for i in rows if faster in owned(data, i)]
    if entropy and shown:
        loss = loss - entropy * sum(H(torch.stack(list(l(p, data, i, faster, C).values()))) for i in shown) / len(shown)
    return loss
