"""Multimodal Negative Learning, sample by sample and symbol by symbol; slow on purpose.

Where the paper is silent: a sample counts for the modalities that it has, the mean of the guided term runs over all
samples, and the guide of more than two modalities must win both criteria, each student weighing lambda / (M - 1).
"""

import cmsfed
import torch
from fedcmi import CE, linear, owned, phi, softmax


def f(p, data, i, m):
    return linear(p, f"head.{m}", phi(p, m, data.x[m][i]))


def out(p, data, i, modalities):
    """The mean of the present branches' logits; a joint head, if there is one."""
    if "head.joint.weight" in p:
        return cmsfed.out(p, data, i, modalities)
    return sum(f(p, data, i, m) for m in owned(data, i)) / len(owned(data, i))


def best_wrong(o, y):
    return max((c for c in range(len(o)) if c != y), key=lambda c: float(o[c]))


def RDM(branches, fused, y, competitor):
    """The robust dominant modality of a sample, or None: {m: logits} of the present branches."""
    j = {m: best_wrong(fused if competitor == "fused" else o, y) for m, o in branches.items()}
    P = {m: float(softmax(o)[y]) for m, o in branches.items()}
    xi = {m: float(o[y] - o[j[m]]) for m, o in branches.items()}
    for m in branches:
        if all(P[m] > P[n] and xi[m] > xi[n] for n in branches if n != m):
            return m
    return None


def MNL(P_rdm, o_im, y):
    log_p = torch.log(softmax(o_im))
    return -sum(float(P_rdm[c]) * log_p[c] for c in range(len(o_im)) if c != y)


def L(p, p_hat, data, rows, modalities, *, lam=0.7, competitor="fused", guide="local", reduction="paper", extra=False):
    loss = sum(CE(out(p, data, i, modalities), int(data.y[i])) for i in rows) / len(rows)
    for m in data.modalities:
        own = [CE(f(p, data, i, m), int(data.y[i])) for i in rows if m in owned(data, i)]
        if own:
            loss = loss + sum(own) / len(own)
    terms = []
    for i in rows:
        y, here = int(data.y[i]), owned(data, i)
        if len(here) < 2:
            continue
        judge = p if guide == "local" else p_hat
        with torch.no_grad():
            branches = {m: f(judge, data, i, m) for m in here}
            g = RDM(branches, out(judge, data, i, modalities), y, competitor)
        for m in here:
            if g is None or m == g:
                continue
            term = lam / (len(data.modalities) - 1) * MNL(softmax(branches[g]), f(p, data, i, m), y)
            if extra:
                term = term + CE(f(p, data, i, m), y)
            terms.append(term)
    guided = sum(terms) / len(rows) if terms else 0.0
    return loss + (guided / data.classes if reduction == "code" else guided)


def released(o_text, o_image, fused, y, lam=0.7):
    """The guided term of the authors' code for two branches: ties go to the image, mean over batch and classes."""
    total, classes = 0.0, fused.shape[1]
    for i in range(len(y)):
        t = int(y[i])
        j = best_wrong(softmax(fused[i]), t)
        p_t, p_v = softmax(o_text[i]), softmax(o_image[i])
        xi_t, xi_v = o_text[i][t] - o_text[i][j], o_image[i][t] - o_image[i][j]
        if xi_t > xi_v and p_t[t] > p_v[t]:
            guide, student = p_t, p_v
        elif xi_t <= xi_v and p_t[t] <= p_v[t]:
            guide, student = p_v, p_t
        else:
            continue
        for c in range(classes):
            total = total - ((1.0 if c == t else lam * guide[c].detach()) * torch.log(student[c]))
    return total / (len(y) * classes)
