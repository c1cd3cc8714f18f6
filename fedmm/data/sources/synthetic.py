"""synthetic: any number of modalities, dials for their information, and the best attainable accuracy in closed form.

The label y is uniform over C classes. Every sample carries its information in one way, drawn independently:

    unique to m  (probability `unique[m]`)   m shows y's direct symbol, the others show nothing
    redundant    (probability `redundant`)   every modality shows y's direct symbol
    synergy      (probability `synergy`)     modality j shows the synergy symbol a_j, where the a_j are uniform and
                                             independent but for (a_1 + ... + a_M) mod C = y
    none         (what is left)              no modality shows anything

Each shown symbol is, with probability `noise[m]`, replaced by a uniform one of its alphabet. Modality m is a vector:
coordinate a of the first C (direct) or of the second C (synergy) is 1 for a shown symbol, all others are 0, and every
coordinate has uniform noise in +-`spread[m]` < 1/2 on top. A coordinate above 1/2 is therefore a shown symbol with
certainty: x determines the symbols, and the best accuracy given x is the best accuracy given the symbols. `spread` and
`dims` make learning harder without changing that accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import perm, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import DataConfig
from fedmm.data.common import DATA_SEED, TEST_SHARE, VAL_SHARE, check_options, choose_preset, standardise
from fedmm.errors import ConfigError
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec

MOST_MODALITIES = 8  # the closed form sums over the ways to group modalities that agree: 4,140 for 8
SAMPLES = 3500


@dataclass(frozen=True)
class Dials:
    """Checked parameters of `synthetic`; the per-modality ones are in slot order."""

    modalities: tuple[str, ...]
    classes: int
    dims: tuple[int, ...]
    unique: tuple[float, ...]
    redundant: float
    synergy: float
    noise: tuple[float, ...]
    spread: tuple[float, ...]
    samples: int


# Of M modalities, the last is the weak one where they differ.
PRESETS: dict[str, Callable[[int], dict[str, Any]]] = {
    "imbalanced": lambda m: {
        "unique": [0.25 / max(m - 1, 1)] * (m - 1) + [0.10],
        "redundant": 0.40,
        "synergy": 0.10,
        "noise": [0.05] * (m - 1) + [0.40],
        "spread": [0.20] * (m - 1) + [0.45],
    },
    "balanced": lambda m: {"unique": 0.4 / m, "redundant": 0.4, "synergy": 0.1, "noise": 0.1, "spread": 0.3},
    "redundant": lambda m: {"unique": 0.0, "redundant": 1.0, "synergy": 0.0, "noise": 0.3, "spread": 0.3},
    "unique": lambda m: {"unique": 1.0 / m, "redundant": 0.0, "synergy": 0.0, "noise": 0.0, "spread": 0.3},
    "synergy": lambda m: {"unique": 0.0, "redundant": 0.0, "synergy": 1.0, "noise": 0.0, "spread": 0.3},
}
DEFAULT = "imbalanced"


def load(cfg: DataConfig) -> Dataset:
    """Vectors [dims] a modality, `samples` of them (3,500) split 4 : 1 : 2; no natural clients.

    Params, beside the preset's: `modalities` (a number M >= 2, or names; "m1", "m2" by default), `classes` (8),
    `dims` (2 classes + 8), `unique`, `noise`, `spread` (one number, a list or a mapping by modality), `redundant`,
    `synergy`, `samples`.

    Raises:
        ConfigError: Unknown preset or parameter, or a value out of its range.
    """
    check_options(cfg, [field.name for field in fields(Dials)])
    name, _ = choose_preset(cfg, PRESETS, DEFAULT)
    dials = read_dials(cfg.params, name)
    y, symbols = draw(dials, dials.samples, numpy_rng(DATA_SEED, "synthetic"))
    n = len(y)
    split = np.zeros(n, dtype=np.int8)
    val, test = max(1, round(n * VAL_SHARE)), max(1, round(n * TEST_SHARE))
    split[n - test - val : n - test], split[n - test :] = 1, 2
    rng = numpy_rng(DATA_SEED, "synthetic-emission")
    x = {m: standardise(emit(dials, j, symbols[:, j], rng), split == 0) for j, m in enumerate(dials.modalities)}
    return Dataset(
        name=f"synthetic:{name}",
        specs={m: ModalitySpec("vector", (dims,)) for m, dims in zip(dials.modalities, dials.dims, strict=True)},
        classes=tuple(f"c{c}" for c in range(dials.classes)),
        x=x,
        y=y,
        split=split,
        unit=np.arange(n, dtype=np.int64),
        present={m: np.ones(n, dtype=np.bool_) for m in x},
    )


def draw(dials: Dials, samples: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Labels [N] and symbols [N, M]: -1 nothing, 0..C-1 direct, C..2C-1 synergy."""
    m, c = len(dials.modalities), dials.classes
    y = rng.integers(0, c, samples)
    way = np.searchsorted(np.cumsum([*dials.unique, dials.redundant, dials.synergy]), rng.random(samples), "right")
    direct = (way[:, None] == np.arange(m)) | (way == m)[:, None]
    parts = rng.integers(0, c, (samples, m))
    parts[:, -1] = (y - parts[:, :-1].sum(axis=1)) % c
    synergy = (way == m + 1)[:, None]
    symbol = np.where(synergy, parts, y[:, None])
    wrong = rng.random((samples, m)) < np.array(dials.noise)
    symbol = np.where(wrong, rng.integers(0, c, (samples, m)), symbol)
    return y, np.where(synergy, symbol + c, np.where(direct, symbol, -1))


def emit(
    dials: Dials, modality: int, symbols: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Vectors [N, dims] of one modality (its slot) for its symbols [N], before standardisation."""
    dims, spread = dials.dims[modality], dials.spread[modality]
    x = rng.uniform(-spread, spread, (len(symbols), dims))
    shown = np.flatnonzero(symbols >= 0)
    x[shown, symbols[shown]] += 1.0
    return x.astype(np.float32)


def bayes_accuracy(params: Mapping[str, Any], subset: Sequence[str], preset: str = DEFAULT) -> float:
    """Best attainable accuracy of a classifier that sees the modalities `subset`, exactly.

    With q_m = 1 - noise_m + noise_m / C the chance that a shown symbol is the right one, and S the subset:

        acc(S) = sum over m in S of unique_m q_m + redundant R(S) + synergy Y(S) + (everything else) / C
        Y(S)   = prod over m of (1 - noise_m) (1 - 1/C) + 1/C when S holds every modality, else 1/C
        R(S)   = best vote of |S| independent noisy copies of y, see `vote_accuracy`

    The sum is exact since the kinds of symbols seen tell the ways apart, or leave only ways with the same posterior.

    Args:
        params: `data.params` of the configuration; what is left out comes from the preset.
        subset: Names of modalities; empty = guessing.
        preset: `data.preset` of the configuration.

    Raises:
        ConfigError: A parameter out of range or an unknown modality.
    """
    dials = read_dials(params, preset)
    for name in subset:
        if name not in dials.modalities:
            raise ConfigError(f"no modality {name!r}", remedy=f"choose from: {', '.join(dials.modalities)}")
    seen = [j for j, name in enumerate(dials.modalities) if name in subset]
    chance = 1.0 / dials.classes
    right = [1.0 - noise * (1.0 - chance) for noise in dials.noise]
    unique = sum(dials.unique[j] * right[j] for j in seen)
    redundant = dials.redundant * vote_accuracy([dials.noise[j] for j in seen], dials.classes)
    complete = len(seen) == len(dials.modalities)
    whole = prod(1.0 - noise for noise in dials.noise) * (1.0 - chance) + chance if complete else chance
    rest = 1.0 - sum(dials.unique[j] for j in seen) - dials.redundant - dials.synergy
    return unique + redundant + dials.synergy * whole + rest * chance


def vote_accuracy(noise: Sequence[float], classes: int) -> float:
    """Best accuracy from independent copies of y, copy m replaced by a uniform symbol with probability noise[m].

    Sums max_y P(y, o) over the observations o, taken together by which copies agree: there are
    C (C-1) ... (C-k+1) observations with k given groups of agreeing copies.
    """
    wrong = [v / classes for v in noise]
    right = [1.0 - v + v / classes for v in noise]
    total = 0.0
    for groups in _groupings(len(noise)):
        best = max(
            (prod(right[j] if j in group else wrong[j] for j in range(len(noise))) for group in groups),
            default=1.0,
        )
        total += perm(classes, len(groups)) * best
    return total / classes


def _groupings(count: int) -> Iterator[list[set[int]]]:
    """All set partitions of range(count)."""
    if count == 0:
        yield []
        return
    for groups in _groupings(count - 1):
        for i in range(len(groups)):
            yield [*groups[:i], groups[i] | {count - 1}, *groups[i + 1 :]]
        yield [*groups, {count - 1}]


def read_dials(params: Mapping[str, Any], preset: str = DEFAULT) -> Dials:
    """Check parameters and complete them from a preset.

    Raises:
        ConfigError: A value of the wrong type or out of its range.
    """
    names = _names(params.get("modalities", 2))
    given = PRESETS[preset](len(names)) | dict(params)
    classes = _whole(given, "classes", 8, 2)
    dims = _each(given, "dims", names, 2 * classes + 8)
    if any(d != int(d) for d in dims):
        raise ConfigError(f"{given['dims']!r} is not possible", where="data.params.dims", remedy="use whole numbers")
    dials = Dials(
        modalities=names,
        classes=classes,
        dims=tuple(int(d) for d in dims),
        unique=_each(given, "unique", names, 0.0),
        redundant=_each(given, "redundant", ("",), 0.0)[0],
        synergy=_each(given, "synergy", ("",), 0.0)[0],
        noise=_each(given, "noise", names, 0.0),
        spread=_each(given, "spread", names, 0.0),
        samples=_whole(given, "samples", SAMPLES, 3 * classes),
    )
    _within("dims", dims, 2 * classes, float("inf"), f"at least {2 * classes} (two for each class)")
    _within("noise", dials.noise, 0.0, 1.0, "0 to 1")
    _within("spread", dials.spread, 0.0, 0.49, "0 to 0.49")
    for key in ("unique", "redundant", "synergy"):
        value = getattr(dials, key)
        _within(key, value if isinstance(value, tuple) else (value,), 0.0, 1.0, "0 to 1")
    if (total := sum(dials.unique) + dials.redundant + dials.synergy) > 1.0 + 1e-9:
        raise ConfigError(
            f"unique, redundant and synergy are shares of the samples, but sum to {total:.3f}",
            where="data.params",
            remedy="lower them to a sum of 1 at most",
        )
    return dials


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        names = tuple(f"m{j + 1}" for j in range(max(value, 0)))
    else:
        names = tuple(str(v) for v in value) if isinstance(value, list | tuple) else ()
    if not 2 <= len(names) <= MOST_MODALITIES or len(set(names)) != len(names):
        raise ConfigError(
            f"{value!r} is not possible",
            where="data.params.modalities",
            remedy=f"give a number from 2 to {MOST_MODALITIES}, or that many different names",
        )
    return names


def _whole(given: Mapping[str, Any], key: str, default: int, least: int) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{value!r} is not possible", where=f"data.params.{key}", remedy=f"use at least {least}")
    return value


def _each(given: Mapping[str, Any], key: str, names: Sequence[str], default: float) -> tuple[float, ...]:
    """One number a modality from one number, a list in slot order or a mapping."""
    value = given.get(key, default)
    values: list[object] = [value] * len(names)
    if isinstance(value, Mapping):
        values = [value.get(name) for name in names] if set(value) == set(names) else []
    elif isinstance(value, list | tuple):
        values = list(value)
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != len(names):
        raise ConfigError(
            f"{value!r} is not possible",
            where=f"data.params.{key}",
            remedy=f"give a number, or one for each of: {', '.join(names)}" if names != ("",) else "give a number",
        )
    return tuple(numbers)


def _within(key: str, values: Sequence[float], low: float, high: float, remedy: str) -> None:
    if not all(low <= v <= high for v in values):
        shown = list(values) if len(values) > 1 else values[0]
        raise ConfigError(f"{shown!r} is out of range", where=f"data.params.{key}", remedy=f"use {remedy}")
