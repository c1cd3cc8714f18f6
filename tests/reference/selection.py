"""Section 4.5 to the letter: stochastic greedy over two facility-location functions, in plain Python."""

import math


def euclid(g):
    """D[i][j] = ||g_i - g_j||_2 of a list of vectors."""
    return [[math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True))) for v in g] for u in g]


def random_subset(rng, V, size):
    """A random subset of V of this size (all of V if it is no larger)."""
    if size >= len(V):
        return list(V)
    return [V[int(i)] for i in rng.choice(len(V), size=size, replace=False)]


def cost(cov, D, j):
    return sum(min(cov[k], D[k][j]) for k in range(len(D)))


def argmin(R, cov, D):
    """The first of R with the least cost; sums that differ by rounding alone are equal."""
    least = min(cost(cov, D, j) for j in R)
    return next(j for j in R if cost(cov, D, j) <= least * (1 + 1e-12))


def balanced(V, m, N, D_M, D_W, b, theta, modality_1_dominates, owners_of_W, rng, size=None):
    """[(client, "all" or "weak")] of one round; b[k] = acc_1 / acc_2 of client k."""
    V, S = list(V), []
    cov_M, cov_W = [math.inf] * N, [math.inf] * N
    for _ in range(min(m, len(V))):
        R = random_subset(rng, V, size or max(m, math.floor(0.1 * N)))
        i_M = argmin(R, cov_M, D_M)
        R_W = [j for j in R if j in owners_of_W]
        i_W = argmin(R_W, cov_W, D_W) if R_W else None
        imbalanced = i_W is not None and (b[i_W] > theta if modality_1_dominates else b[i_W] < 1 / theta)
        if imbalanced:
            S.append((i_W, "weak"))
            cov_W = [min(cov_W[k], D_W[k][i_W]) for k in range(N)]
        else:
            S.append((i_M, "all"))
            cov_M = [min(cov_M[k], D_M[k][i_M]) for k in range(N)]
        V.remove(S[-1][0])
    return S


def divfl(V, m, N, D, rng, size=None):
    """Facility location without the uni-modal branch."""
    V, S, cov = list(V), [], [math.inf] * N
    for _ in range(min(m, len(V))):
        R = random_subset(rng, V, size or max(m, math.floor(0.1 * N)))
        i = argmin(R, cov, D)
        S.append(i)
        cov = [min(cov[k], D[k][i]) for k in range(N)]
        V.remove(i)
    return S


def power_of_choice(drawn, losses, m):
    """The m of the drawn candidates with the largest loss, found by repeated search."""
    left, S = sorted(drawn), []
    while left and len(S) < m:
        best = left[0]
        for k in left:
            if losses[k] > losses[best]:
                best = k
        S.append(best)
        left.remove(best)
    return sorted(S)
