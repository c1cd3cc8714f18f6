"""Server methods to the letter, number by number; models are {name: list of numbers} of one block."""

from math import copysign, sqrt


def mean(clients):
    """clients: [(n_k, {name: list})] -> sum_k n_k w_k / sum_k n_k."""
    total = sum(n for n, _ in clients)
    return {
        name: [sum(n * w[name][i] for n, w in clients) / total for i in range(len(clients[0][1][name]))]
        for name in clients[0][1]
    }


def adaptive(kind, w, clients, memory, *, eta, tau, beta_1=0.0, beta_2=0.0, correction=False):
    """One round of algorithm 2 (Reddi et al., 2021) on one block; `memory` is changed, and begins empty."""
    if not clients:
        return w
    memory["t"] = memory.get("t", 0) + 1
    rate = eta
    if correction:
        rate = eta * sqrt(1 - beta_2 ** (memory["t"] + 1)) / (1 - beta_1 ** (memory["t"] + 1))
    average, new = mean(clients), {}
    for name, values in w.items():
        new[name] = []
        for i, x in enumerate(values):
            m, v = memory.get((name, i), (0.0, 0.0))
            delta = average[name][i] - x
            m = beta_1 * m + (1 - beta_1) * delta
            if kind == "fedadagrad":
                v = v + delta**2
            elif kind == "fedyogi":
                sign = 0.0 if v == delta**2 else copysign(1.0, v - delta**2)
                v = v - (1 - beta_2) * delta**2 * sign
            else:
                v = beta_2 * v + (1 - beta_2) * delta**2
            memory[name, i] = m, v
            new[name].append(x + rate * m / (sqrt(v) + tau))
    return new


def normalised(w, clients, rho):
    """FedNova (Wang et al., 2020) on one block; clients: [(n_k, steps, {name: list})]."""
    if not clients:
        return w
    total = sum(n for n, _, _ in clients)
    effective, new = 0.0, {name: list(values) for name, values in w.items()}
    lengths = []
    for n, steps, _ in clients:
        # a_k step by step: gradient i of tau moves the weights once for each later step, less and less.
        length = sum(sum(rho**j for j in range(steps - i)) for i in range(steps))
        lengths.append(length)
        effective += n / total * length
    for name, values in w.items():
        for i, x in enumerate(values):
            direction = sum(
                n / total * (x - theirs[name][i]) / a for (n, _, theirs), a in zip(clients, lengths, strict=True)
            )
            new[name][i] = x - effective * direction
    return new
