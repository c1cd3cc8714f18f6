"""Update directions of clients, and the distances between them: what submodular selection decides by.

Three sizes of federation, three costs (K clients, P parameters, per kind of vector):

    K <= 2,000     distances, kept between rounds in float64                    8 K^2 bytes, at most 32 MB
    K <= 10,000    kept likewise in float32                                     4 K^2 bytes, at most 400 MB
    above          no matrix: the selector computes what it needs from the vectors

A round changes few vectors; only their rows are computed anew, O(changed K P). Vectors are float32 [K, P]. Where they
would pass `MEMORY`, each is kept as its sketch of `WIDTH` numbers (see `sketch`), and all distances are estimates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmm import seeding
from fedmm.jobs import turned
from fedmm.models.blocks import block_of, is_float
from fedmm.types import Tensors
from server.aggregation import Gathered, Update
from server.facts import Federates, Knowledge

Matrix: TypeAlias = npt.NDArray[np.floating[Any]]

MEMORY = 2**28
"""Bytes that the float32 vectors [K, P] of one kind may take (256 MiB); above, they are kept as sketches."""

WIDTH = 256
"""Numbers of a sketch. An estimated distance has a standard error of about 1 / sqrt(2 WIDTH) = 4.4 % of itself."""

DOUBLE = 2_000
"""Most clients whose distances are kept in float64."""

STORED = 10_000
"""Most clients whose distances are kept at all."""

_COORDINATES = 2**16  # of one block of a sketch: bounds what is permuted at a time
_CHUNK = 2**24  # numbers (64 MB in float32) of the rows that are worked on at a time
_CLOSE = 1e-6  # squared distance, relative to squared lengths, below which the Gram form has too few digits
_NEAR = 1 / 32  # likewise for the Gram form of float32 vectors
_COLUMNS = 4096  # coordinates of one product of float32 numbers
_ROWS, _LEAST = 256, 32  # rows of the distances that are computed at a time, and no fewer


def sketch(rows: Tensor, width: int, seed: int) -> Tensor:
    """Random projection of rows [k, P] to [k, width] that preserves distances on average, at O(k P).

    Signs are drawn for all coordinates, the coordinates are permuted and folded onto `width` sums: a count sketch
    with balanced buckets (Charikar, Chen and Farach-Colton 2002; Weinberger et al., ICML 2009). Squared distances
    are unbiased with a relative standard deviation of at most sqrt(2 / width). The same seed gives the same
    projection, whatever the rows. Rows that are short enough are returned as they are.

    Args:
        rows: Float [k, P].
        width: Numbers kept a row.
        seed: Names the projection.
    """
    if rows.shape[1] <= width:
        return rows
    folded = rows.new_zeros(len(rows), width)
    for number, start in enumerate(range(0, rows.shape[1], _COORDINATES)):
        block, rng = rows[:, start : start + _COORDINATES], seeding.numpy_rng(seed, "sketch", number)
        order = torch.from_numpy(rng.permutation(block.shape[1]))
        signs = torch.from_numpy(rng.integers(0, 2, block.shape[1]) * 2 - 1).to(rows.dtype)
        # Piece by piece: a row's sums must not depend on how many rows came with it.
        for piece in torch.split(block[:, order] * signs, width, dim=1):
            folded[:, : piece.shape[1]] += piece
    return folded


def unit(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of zeros stay."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.clamp(min=1e-12)


def distances(
    vectors: Tensor,
    normalise: bool = False,
    rows: Sequence[int] = (),
    known: Matrix | None = None,
    lengths: Tensor | None = None,
) -> Matrix:
    """Euclidean distances [K, K] between direction vectors [K, P], symmetric, exact zeros on the diagonal.

    By |a|^2 + |b|^2 - 2ab: products of a few thousand coordinates in the vectors' own format, added up in float64.
    Pairs too close for that format are computed anew in float64, and pairs too close for this by differences. Kept
    in float64 up to `DOUBLE` clients, else in float32.

    Args:
        vectors: One row a client.
        normalise: Scale rows to unit length first (an option, not the paper's).
        rows: With `known`: the clients whose vectors changed; only their rows and columns are computed.
        known: Distances before the change; brought up to date in place, and returned.
        lengths: `squared_lengths` of the vectors as they are now.
    """
    count = len(vectors)
    result = np.empty((count, count), np.float64 if count <= DOUBLE else np.float32) if known is None else known
    changed = np.arange(count) if known is None else np.asarray(rows, dtype=np.int64)
    lengths = squared_lengths(vectors) if lengths is None else lengths
    for start in range(0, len(changed), _ROWS):
        block = changed[start : start + _ROWS]
        part = _squares_from(vectors, torch.from_numpy(block), lengths, normalise).clamp_(min=0).sqrt_().numpy()
        part = part.astype(result.dtype, copy=False)
        result[block] = part
        result[:, block] = part.T
        # Rows of one block were computed twice against each other: keep the matrix symmetric to the bit.
        corner = result[np.ix_(block, block)]
        result[np.ix_(block, block)] = np.minimum(corner, corner.T)
    return result


def squared_lengths(vectors: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """|g|^2 of some rows of [K, P] (None: of all), float64, added up like the products that it is compared with."""
    which = None if rows is None else torch.as_tensor(rows)
    total = torch.zeros(len(vectors if which is None else which), dtype=torch.float64)
    for piece in torch.split(vectors, _COLUMNS, 1):
        some = piece if which is None else piece.index_select(0, which)
        total += torch.linalg.vector_norm(some, dim=1).to(torch.float64).square_()
    return total


def _squares_from(vectors: Tensor, which: Tensor, lengths: Tensor, normalise: bool) -> Tensor:
    """Squared distances [r, K], float64, from the vectors of some clients to those of all."""
    # A product's rounding depends on its size where it is small: no fewer rows than `_LEAST` at a time.
    rows = torch.cat([which, which[-1:].expand(max(0, _LEAST - len(which)))])
    whole = len(rows) == len(vectors) and torch.equal(rows, torch.arange(len(vectors)))
    products = torch.zeros(len(rows), len(vectors), dtype=torch.float64)
    for piece in torch.split(vectors, _COLUMNS, 1):
        products += (piece if whole else piece.index_select(0, rows)) @ piece.T
    squares, total = (t[: len(which)] for t in _gram_form(products, lengths[rows], lengths, normalise))
    others = which.unsqueeze(1) != torch.arange(len(vectors))
    squares *= others
    if vectors.dtype != torch.float64:
        near = (squares < _NEAR * total) & others
        if bool(near.any()):
            i, j = near.any(1).nonzero().squeeze(1), near.any(0).nonzero().squeeze(1)
            here = i.unsqueeze(1), j
            squares[here] = torch.where(near[here], _fine_squares(vectors, which[i], j, normalise), squares[here])
    close = ((squares < _CLOSE * total) & others).nonzero()
    for pairs in torch.split(close, max(1, _CHUNK // max(1, vectors.shape[1]))):
        i, j = pairs.unbind(1)
        a, b = (_doubles(vectors[rows], normalise) for rows in (which[i], j))
        squares[i, j] = (a - b).square().sum(1)
    return squares


def _fine_squares(vectors: Tensor, rows: Tensor, columns: Tensor, normalise: bool) -> Tensor:
    """Squared distances [r, s] between some clients' vectors and others', all in float64."""
    products = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    own, other = products.new_zeros(len(rows)), products.new_zeros(len(columns))
    for piece in torch.split(vectors, _COLUMNS, 1):
        a, b = (piece[some].to(torch.float64) for some in (rows, columns))
        products += a @ b.T
        own += a.square().sum(1)
        other += b.square().sum(1)
    return _gram_form(products, own, other, normalise)[0]


def _gram_form(products: Tensor, own: Tensor, other: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """|a|^2 + |b|^2 - 2ab and |a|^2 + |b|^2, [r, s], from products [r, s], which are spoilt, and squared lengths."""
    own = own.unsqueeze(1)
    if normalise:
        products /= (own.sqrt() * other.sqrt()).clamp(min=1e-12)
        own, other = own.sign(), other.sign()
    total = own + other
    return torch.sub(total, products, alpha=2, out=products), total


def _doubles(vectors: Tensor, normalise: bool) -> Tensor:
    return unit(vectors.to(torch.float64)) if normalise else vectors.to(torch.float64)


@dataclass(frozen=True)
class _Kept:
    """Vectors, their `squared_lengths`, and the distances between them."""

    vectors: Tensor
    lengths: Tensor
    matrix: Matrix


class Directions(Knowledge):
    """Last update direction w - w_k of every client, decoupled by modality: the vectors of submodular selection.

    joint [K, P]: all encoder deltas, refreshed when a client trained all its modalities; a lacking modality gives
    zeros. encoder.<m> [K, P_m]: refreshed in the bootstrap, and then when the client trained m alone (a weak-only
    pick). whole [K, P']: deltas of all blocks (DivFL's own vectors). Clients that were not picked keep stale vectors.
    Coordinates are the float tensors of the key's blocks, sorted by name, flattened, one after another; of more than
    `MEMORY` bytes, their sketch. Whole vectors are written when they are asked for: a client that trains in every
    round and is compared with nobody costs nothing.
    Source: BMSFed, section "selection"; DivFL (Balakrishnan et al., ICLR 2022).
    """

    bootstrap = True
    deltas = "encoder."

    def __init__(self, federates: Federates) -> None:
        # key -> clients, and their changes part by part, which are not in the key's vectors yet
        self._waiting: dict[str, list[tuple[list[int], list[Tensor]]]] = {}
        super().__init__(federates)
        # key, normalise -> what is kept of its distances, and rows that changed since
        self._distances: dict[tuple[str, bool], tuple[_Kept, set[int]]] = {}
        self._sketched: set[str] = set()

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Overwrite the vectors that the module's text says."""
        bootstrap = not self._tensors
        for key in self.kinds():
            names = self.covered(key, sent)
            length = sum(sent[n].numel() for n in names)
            _, sketched = self._vectors(key, length)
            refreshed = {u.client: u for u in updates if self.refreshes(key, u.modalities, u.complete, bootstrap)}
            self._write(key, refreshed.keys())
            for change in updates.changes if isinstance(updates, Gathered) else ():
                mine = [i for i, client in enumerate(change.clients) if client in refreshed]
                if mine:
                    some: slice | list[int] = slice(None) if len(mine) == len(change.clients) else mine
                    parts = [
                        change.rows[n][some] if n in change.rows else torch.zeros(len(mine), sent[n].numel())
                        for n in names
                    ]
                    self._waiting.setdefault(key, []).append(([change.clients[i] for i in mine], parts))
            if sketched:
                self._write(key)
            fresh = [u for u in refreshed.values() if u.model]
            step = max(1, _CHUNK // max(1, length))
            for part in (fresh[i : i + step] for i in range(0, len(fresh), step)):
                rows = torch.stack(
                    [torch.cat([(sent[n] - u.model.get(n, sent[n])).flatten() for n in names]) for u in part]
                )
                self.learn_rows(key, [u.client for u in part], rows)

    def learn_rows(self, key: str, clients: Sequence[int], rows: Tensor) -> None:
        """Overwrite the vectors of some clients under one key.

        Args:
            key: One of `kinds()`.
            clients: Whose they are, all different.
            rows: Differences sent - received [k, P], coordinates as the class's text says (`covered`).
        """
        self._learn_parts(key, clients, [rows])

    def _learn_parts(self, key: str, clients: Sequence[int], parts: Sequence[Tensor]) -> None:
        """`learn_rows` of rows in parts [k, *shape], matrices `turned`, that lie side by side."""
        parts = [turned(part).flatten(1) for part in parts]
        length = sum(part.shape[1] for part in parts)
        vectors, sketched = self._vectors(key, length)
        if sketched:
            seed, rows = seeding.derive(0, f"directions/{key}", length), torch.cat(parts, 1)
            step = max(1, _CHUNK // max(1, length))
            for start in range(0, len(clients), step):
                some = rows[start : start + step].to(vectors.dtype)
                vectors[list(clients[start : start + step])] = sketch(some, WIDTH, seed)
        else:
            # NumPy copies whole rows, a few times as fast as an indexed assignment here.
            into, at = vectors.numpy(), 0
            for part in parts:
                into[list(clients), at : at + part.shape[1]] = part.numpy()
                at += part.shape[1]
        for (cached, _), (_, stale) in self._distances.items():
            if cached == key:
                stale.update(clients)

    def _vectors(self, key: str, length: int) -> tuple[Tensor, bool]:
        """The key's tensor, made if need be, and whether it holds sketches of vectors of this length."""
        size, name = len(self.federates.owned), f"direction.{key}"
        sketched = length > WIDTH and 4 * size * length > MEMORY
        if name not in self._tensors:
            self._tensors[name] = torch.zeros(size, WIDTH if sketched else length)
        if sketched:
            self._sketched.add(key)
        return self._tensors[name], sketched

    def _write(self, key: str, but: Collection[int] = ()) -> None:
        """Write what waits into the key's vectors, save where it is all of clients that are about to change again."""
        for clients, parts in self._waiting.pop(key, []):
            if not all(client in but for client in clients):
                self._learn_parts(key, clients, parts)

    @property
    def tensors(self) -> Tensors:
        """Vectors of every kind."""
        for key in list(self._waiting):
            self._write(key)
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._waiting.clear()

    def kinds(self) -> tuple[str, ...]:
        """Kinds of vectors that are kept."""
        return ("joint", *[f"encoder.{m}" for m in self.federates.modalities])

    def covered(self, key: str, model: Tensors) -> list[str]:
        """Float tensors of the model that make up a vector, in the order of its coordinates."""
        # Sorted: a model that comes from a checkpoint lists its tensors in another order.
        return sorted(n for n, t in model.items() if is_float(t) and self._covers(key, n))

    @staticmethod
    def _covers(key: str, name: str) -> bool:
        block = block_of(name)
        if key == "joint":
            return block.startswith("encoder.")
        return key == "whole" or block == key

    @staticmethod
    def refreshes(key: str, modalities: Sequence[str], complete: bool, bootstrap: bool) -> bool:
        """Whether an update overwrites its client's vector.

        Args:
            key: One of `kinds()`.
            modalities: Trained.
            complete: These are all that the client owns.
            bootstrap: The first updates ever (ask before handing over any rows: `not known.tensors`).
        """
        if key.startswith("encoder."):
            return bootstrap or tuple(modalities) == (key.removeprefix("encoder."),)
        return complete

    def distances(self, key: str, normalise: bool = False) -> Matrix:
        """Distances [K, K] between `vectors(key)`; rows that did not change since the last call are not recomputed.

        The matrix is for reading, until the next call brings it up to date.

        Raises:
            ValueError: More than `STORED` clients.
        """
        vectors = self.vectors(key)
        if len(vectors) > STORED:
            raise ValueError(f"distances between {len(vectors)} clients are not kept; use their vectors")
        kept, stale = self._distances.pop((key, normalise), (None, set[int]()))
        if kept is None or kept.vectors is not vectors:
            # Another tensor than before (a restored checkpoint): nothing is known of it.
            lengths = squared_lengths(vectors)
            kept = _Kept(vectors, lengths, distances(vectors, normalise, lengths=lengths))
        elif rows := sorted(stale):
            kept.lengths[rows] = squared_lengths(vectors, rows)
            distances(vectors, normalise, rows, kept.matrix, kept.lengths)
        self._distances[key, normalise] = (kept, set())
        return kept.matrix

    def metrics(self) -> dict[tuple[str, str], float]:
        """Numbers of a sketch, where vectors are kept as such."""
        return {("fused", "direction_sketch"): float(WIDTH)} if self._sketched else {}

    def vectors(self, key: str) -> Tensor:
        """Vectors [K, P] (or their sketches) of "joint", "whole" or "encoder.<m>"."""
        self._write(key)
        return self._tensors[f"direction.{key}"]


class WholeDirections(Directions):
    """Last update direction of every client over all blocks: DivFL's vectors."""

    deltas = ""

    def kinds(self) -> tuple[str, ...]:
        """All blocks together."""
        return ("whole",)
