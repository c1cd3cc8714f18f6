"""The ARM-style problem, symbol by symbol, with H an n x n matrix and every inverse taken; slow on purpose.

A sample lacks a modality where its row is NaN. Where some do: the first term runs over the samples that have the
strong modality, a weak one's terms over those that have both, centred among themselves, with weight l2 n / n_p divided
by the number of weak modalities.
"""

import numpy as np
from scipy.linalg import eigh


def centre(A):
    return A - A.mean(0)


def owned(A):
    return ~np.isnan(A).all(1)


def onehot(y, C):
    return np.eye(C)[y]


def ridge(X, Y, l1):
    return np.linalg.inv(X.T @ X + l1 * np.eye(X.shape[1])) @ X.T @ Y


def P_step(X, Z, Y, W, eta, mu, r):
    left = Z.T @ X @ W @ W.T @ X.T @ Z + eta * Z.T @ Y @ Y.T @ Z
    values, vectors = eigh(left, Z.T @ Z + mu * np.eye(Z.shape[1]))
    useful = values > 1e-12 * max(values.max(), 0)  # Other directions explain nothing and are arbitrary.
    return vectors[:, [i for i in np.argsort(-values)[:r] if useful[i]]]


def H(Z, P):
    return Z @ P @ P.T @ Z.T


def pairs(views, y, C, strong, l2):
    """[(name, weight, X, Z, Y)] of the weak modalities, each on the samples that have both, centred."""
    n = owned(views[strong]).sum()
    found = []
    for m in sorted(views):
        both = owned(views[strong]) & owned(views[m])
        if m != strong and both.sum() >= 2:
            found.append((m, n / both.sum(), *(centre(A[both]) for A in (views[strong], views[m], onehot(y, C)))))
    return [(m, l2 / len(found) * scale, *rest) for m, scale, *rest in found]


def J(W, P, views, y, C, strong, l1, l2, eta):
    here = owned(views[strong])
    X, Y = centre(views[strong][here]), centre(onehot(y, C)[here])
    value = np.sum((X @ W - Y) ** 2) + l1 * np.sum(W**2)
    for m, weight, X_p, Z_p, Y_p in pairs(views, y, C, strong, l2):
        H_p = H(Z_p, P[m])
        value += weight * np.trace(W.T @ X_p.T @ (np.eye(len(H_p)) - H_p) @ X_p @ W)
        value -= weight * eta * np.trace(Y_p.T @ H_p @ Y_p)
    return value


def ARM(views, y, C, strong, rounds, l1=1.0, l2=1.0, eta=1.0, mu=1e-2, r=None):
    """W, b, {weak: P} and J after each of `rounds` alternations."""
    here = owned(views[strong])
    X, Y = centre(views[strong][here]), centre(onehot(y, C)[here])
    r = C - 1 if r is None else r
    W = ridge(X, Y, l1)
    path = []
    for _ in range(rounds):
        P, A = {}, X.T @ X + l1 * np.eye(X.shape[1])
        for m, weight, X_p, Z_p, Y_p in pairs(views, y, C, strong, l2):
            P[m] = P_step(X_p, Z_p, Y_p, W, eta, mu, r)
            A = A + weight * (X_p.T @ X_p - X_p.T @ H(Z_p, P[m]) @ X_p)
        W = np.linalg.inv(A) @ X.T @ Y
        path.append(J(W, P, views, y, C, strong, l1, l2, eta))
    b = onehot(y, C)[here].mean(0) - views[strong][here].mean(0) @ W
    return W, b, P, path


def GCV(A, y, C, l1):
    """n ||(I - S) Y||^2 / tr(I - S)^2 by the smoother S of ridge regression with a free offset, over Var(Y)."""
    here = owned(A)
    X, Y, n = centre(A[here]), onehot(y, C)[here], here.sum()
    S = X @ np.linalg.inv(X.T @ X + l1 * np.eye(X.shape[1])) @ X.T + np.ones((n, n)) / n
    rest = np.eye(n) - S
    return n * np.sum((rest @ Y) ** 2) / np.trace(rest) ** 2 / (np.sum(centre(Y) ** 2) / n)
