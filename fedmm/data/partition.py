"""How training samples are spread over clients: pure functions of labels and a generator.

Every function returns K sorted index arrays that hold each sample exactly once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import PartitionConfig
from fedmm.errors import ConfigError

Labels = npt.NDArray[np.int64]
Indices = list[npt.NDArray[np.int64]]


def iid(y: Labels, clients: int, rng: np.random.Generator) -> Indices:
    """Equal random shares; y [N]."""
    return _split(
        rng.permutation(len(y)), np.full(clients, len(y) // clients) + (np.arange(clients) < len(y) % clients)
    )


def dirichlet(
    y: Labels, clients: int, rng: np.random.Generator, alpha: float, cap: float = 1.1, min_samples: int = 1
) -> Indices:
    """Label skew, the capped form of the FedCMI and BMSFed experiments.

    Class after class, shares ~ Dirichlet(alpha) over clients; a client that already holds more than cap x N/K
    samples gets none of the class and the other shares are renormalised. Clients below `min_samples` are then
    filled up with random samples of the largest clients.

    Args:
        y: Labels [N].
        clients: K.
        rng: Source of all randomness.
        alpha: Concentration; small = skewed.
        cap: See above.
        min_samples: Least number of samples of a client.
    """
    owner = np.empty(len(y), dtype=np.int64)
    sizes = np.zeros(clients, dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        weights = rng.dirichlet(np.full(clients, alpha)) * (sizes <= cap * len(y) / clients)
        if weights.sum() <= 0:  # every share underflowed or is capped: fall back to the emptiest clients
            weights = (sizes == sizes.min()).astype(float)
        owner[rows] = np.repeat(np.arange(clients), _apportion(weights, len(rows)))
        sizes += np.bincount(owner[rows], minlength=clients)
    return _fill_up(_group(owner, clients), min_samples, rng)


def quantity(y: Labels, clients: int, rng: np.random.Generator, sigma: float, min_samples: int = 1) -> Indices:
    """Size skew: random shares whose sizes are log-normal with standard deviation `sigma`, after `min_samples` each."""
    weights = np.exp(sigma * rng.standard_normal(clients))
    sizes = min_samples + _apportion(weights, len(y) - clients * min_samples)
    return _split(rng.permutation(len(y)), sizes)


def pathological(
    y: Labels, clients: int, rng: np.random.Generator, classes_per_client: int, min_samples: int = 1
) -> Indices:
    """Each client holds `classes_per_client` classes at most; a class is shared evenly by its owners.

    Raises:
        ConfigError: More classes a client than there are, too few clients to place every class, or too few samples
            of the classes to give every client `min_samples`.
    """
    labels = np.unique(y)
    where = "scenario.partition.classes_per_client"
    if classes_per_client > len(labels):
        raise ConfigError(
            f"{classes_per_client} classes a client, but the training data have {len(labels)}", where=where
        )
    if clients * classes_per_client < len(labels):
        raise ConfigError(
            f"{clients} clients with {classes_per_client} classes cannot hold all {len(labels)} classes",
            where=where,
            remedy="raise it or scenario.clients",
        )
    held = _deal(len(labels), clients, classes_per_client, rng)
    sizes = np.zeros(clients, dtype=np.int64)
    owner = np.empty(len(y), dtype=np.int64)
    for label, holders in enumerate(held):
        rows = rng.permutation(np.flatnonzero(y == labels[label]))
        # The smallest holders come first, so that remainders even sizes out.
        holders = holders[np.argsort(sizes[holders], kind="stable")]
        owner[rows] = holders[np.arange(len(rows)) % len(holders)]
        sizes += np.bincount(owner[rows], minlength=clients)
    if sizes.min() < min_samples:
        raise ConfigError(
            f"some clients would get fewer than {min_samples} samples of their {classes_per_client} classes",
            where="scenario.clients",
            remedy="use fewer clients",
        )
    return _group(owner, clients)


def natural(groups: Labels, clients: int) -> Indices:
    """The data set's own clients, in ascending order; group g goes to client (rank of g) mod K.

    Args:
        groups: Natural client of each sample [N]; samples with -1 are dealt out one by one.
        clients: K.

    Raises:
        ConfigError: Fewer groups than clients.
    """
    names, rank = np.unique(groups[groups >= 0], return_inverse=True)
    if len(names) < clients:
        raise ConfigError(
            f"{clients} clients asked for, but the training data have {len(names)} natural clients",
            where="scenario.clients",
            remedy=f"use at most {len(names)}",
        )
    owner = np.empty(len(groups), dtype=np.int64)
    owner[groups >= 0] = rank % clients
    strangers = np.flatnonzero(groups < 0)
    owner[strangers] = np.arange(len(strangers)) % clients
    return _group(owner, clients)


def heldout(y: Labels, train_counts: npt.NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """Spread validation or test samples over clients in proportion to their training samples of the same class.

    Systematic sampling: every client gets its exact quota of a class, rounded up or down, with the right
    expectation also where quotas are far below one. A class that nobody trains is spread evenly.

    Args:
        y: Labels of the held-out samples [N].
        train_counts: Training samples of each client and class [K, C].
        rng: Source of all randomness.
    """
    clients = len(train_counts)
    owner = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        weights = train_counts[:, label].astype(float)
        if weights.sum() == 0:
            weights = np.ones(clients)
        order = rng.permutation(clients)
        edges = np.cumsum(weights[order]) * (len(rows) / weights.sum())
        edges[np.flatnonzero(weights[order])[-1] :] = len(rows)
        # A sample sits at every i + u, 0 < u <= 1, of a line on which client order[j] covers (edges[j-1], edges[j]].
        owner[rows] = order[np.searchsorted(edges, np.arange(len(rows)) + 1.0 - rng.random())]
    return _group(owner, clients)


def class_counts(y: Labels, indices: Indices, classes: int) -> npt.NDArray[np.int64]:
    """Samples of each client and class, int64 [K, C]."""
    owner = np.repeat(np.arange(len(indices)), [len(rows) for rows in indices])
    labels = y[np.concatenate(indices)] if indices else y[:0]
    return np.bincount(owner * classes + labels, minlength=len(indices) * classes).reshape(len(indices), classes)


@dataclass(frozen=True)
class Partitioner:
    """One entry of `PARTITIONS`: (labels, natural groups or None, K, settings, generator) -> indices."""

    description: str
    assign: Callable[[Labels, Labels | None, int, PartitionConfig, np.random.Generator], Indices]


PARTITIONS: dict[str, Partitioner] = {
    "iid": Partitioner("equal random shares", lambda y, groups, k, cfg, rng: iid(y, k, rng)),
    "dirichlet": Partitioner(
        "label skew: Dirichlet(alpha) shares of every class, capped as in the FedCMI and BMSFed experiments",
        lambda y, groups, k, cfg, rng: dirichlet(y, k, rng, cfg.alpha, cfg.cap, cfg.min_samples),
    ),
    "quantity": Partitioner(
        "size skew: log-normal sizes with standard deviation sigma",
        lambda y, groups, k, cfg, rng: quantity(y, k, rng, cfg.sigma, cfg.min_samples),
    ),
    "pathological": Partitioner(
        "classes_per_client classes a client",
        lambda y, groups, k, cfg, rng: pathological(y, k, rng, cfg.classes_per_client, cfg.min_samples),
    ),
    "natural": Partitioner(
        "the data set's own clients; more of them than clients are merged in turn",
        lambda y, groups, k, cfg, rng: natural(_required(groups), k),
    ),
}


def partition(
    y: Labels, groups: Labels | None, clients: int, cfg: PartitionConfig, rng: np.random.Generator
) -> Indices:
    """Spread N training samples over K clients as `cfg` says.

    Args:
        y: Labels [N].
        groups: Natural client of each sample [N], or None.
        clients: K.
        cfg: Name and settings.
        rng: Source of all randomness.

    Raises:
        ConfigError: Too few samples for K clients, or settings that cannot be met.
    """
    most = len(y) // cfg.min_samples
    if clients > most:
        raise ConfigError(
            f"{clients} clients with {cfg.min_samples} samples each need {clients * cfg.min_samples} training samples, "
            f"the data set has {len(y)}",
            where="scenario.clients",
            remedy=f"use at most {most} clients" if most else "lower scenario.partition.min_samples",
        )
    return PARTITIONS[cfg.name].assign(y, groups, clients, cfg, rng)


def _required(groups: Labels | None) -> Labels:
    if groups is None:
        raise ConfigError(
            "the data set has no natural clients (it has 0)",
            where="scenario.partition.name",
            remedy="use iid, dirichlet, quantity or pathological",
        )
    return groups


def _group(owner: npt.NDArray[np.int64], clients: int) -> Indices:
    """Owner of each sample [N] -> sorted indices of each client."""
    return np.split(np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner, minlength=clients))[:-1])


def _split(order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Indices:
    return _group(np.repeat(np.arange(len(sizes)), sizes)[np.argsort(order, kind="stable")], len(sizes))


def _apportion(weights: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers that sum to `total`, each within one of its share of the weights; zero weight gets zero."""
    edges: npt.NDArray[np.int64] = np.rint(np.cumsum(weights) * (total / weights.sum())).astype(np.int64)
    edges[np.flatnonzero(weights)[-1] :] = total
    return np.diff(edges, prepend=0)


def _fill_up(indices: Indices, least: int, rng: np.random.Generator) -> Indices:
    """Move random samples from the largest clients to those with fewer than `least`."""
    sizes = [len(rows) for rows in indices]
    short = [k for k, size in enumerate(sizes) if size < least]
    if not short:
        return indices
    donors = [(-size, k) for k, size in enumerate(sizes) if size > least]
    heapq.heapify(donors)
    pool = {k: rng.permutation(indices[k]).tolist() for _, k in donors}
    gifts: dict[int, list[int]] = {k: [] for k in short}
    for k in short:
        while sizes[k] + len(gifts[k]) < least:
            size, donor = heapq.heappop(donors)
            gifts[k].append(pool[donor].pop())
            if -size - 1 > least:
                heapq.heappush(donors, (size + 1, donor))
    filled = list(indices)
    for k, rest in pool.items():
        filled[k] = np.sort(np.array(rest, dtype=np.int64))
    for k, gained in gifts.items():
        filled[k] = np.sort(np.concatenate([indices[k], np.array(gained, dtype=np.int64)]))
    return filled


def _deal(classes: int, clients: int, each: int, rng: np.random.Generator) -> Indices:
    """Clients that hold each class: K hands of `each` different classes, every class dealt equally often (+-1)."""
    hands = np.empty((clients, each), dtype=np.int64)
    deck: list[int] = []
    for k in range(clients):
        hand: list[int] = []
        held_back: list[int] = []
        while len(hand) < each:
            if not deck:
                deck = rng.permutation(classes).tolist()
            card = deck.pop()
            (held_back if card in hand else hand).append(card)
        deck += held_back
        hands[k] = hand
    holder = np.repeat(np.arange(clients), each)[np.argsort(hands.reshape(-1), kind="stable")]
    return np.split(holder, np.cumsum(np.bincount(hands.reshape(-1), minlength=classes))[:-1])
