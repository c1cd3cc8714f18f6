"""emoji9: an emoji's picture and its name or tags, nine groups; one client = one vendor's pictures in one language."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import DataConfig
from fedmm.data import container
from fedmm.data.common import DATA_SEED, EMBEDDED, check_options, choose, choose_preset, standardise
from fedmm.data.text import hash_ngrams
from fedmm.errors import ConfigError
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec

PRESETS = {"tags": "tags", "label": "label"}
BUCKETS = 1024
# Shares of code points in validation and test, and code points a client gets of each split by default.
VAL_SHARE, TEST_SHARE = 0.10, 0.20
PER_CLIENT = 130
VAL_PER_TRAIN, TEST_PER_TRAIN = 25 / 130, 50 / 130


def load(cfg: DataConfig) -> Dataset:
    """Emoji picture [3,16,16] and text as hashed n-grams [1024]; 20 natural clients = 2 vendors x 10 languages.

    A sample is (code point, vendor, language). Code points are split, stratified by group, so no emoji is in two
    splits in any drawing or language. Every client has its own random choice of code points.

    Params: `text` = "tags" (the stronger text, default) or "label", also given as preset; `per_client` = training
    code points of a client (130), validation and test in the ratio 25 : 50 to it.

    Raises:
        ConfigError: Unknown preset or parameter, or more code points than there are.
    """
    check_options(cfg, ("text", "per_client"))
    _, preset = choose_preset(cfg, PRESETS, "tags")
    text = choose(cfg, "text", ("tags", "label"), preset)
    arrays, meta = container.read(EMBEDDED / "emoji9.json")
    y, vendors, languages = arrays["labels"].astype(np.int64), meta["vendors"], meta["languages"]
    sizes = _sizes(cfg.params.get("per_client", PER_CLIENT), split := split_codes(y))
    clients = [(v, k) for v in range(len(vendors)) for k in range(len(languages))]
    rng = numpy_rng(DATA_SEED, "emoji9-clients")
    chosen = [
        np.sort(np.concatenate([rng.permutation(np.flatnonzero(split == s))[: sizes[s]] for s in (0, 1, 2)]))
        for _ in clients
    ]
    code = np.concatenate(chosen)
    client = np.repeat(np.arange(len(clients)), [len(rows) for rows in chosen])
    vendor, language = np.array(clients)[client].T
    lines = [container.array_text(arrays[f"text_{k}"]) for k in languages]
    texts = [_field(lines[k][c], text) for k, c in zip(language, code, strict=True)]
    pictures = arrays["images"][vendor, code].transpose(0, 3, 1, 2)
    return Dataset(
        name=f"emoji9:{text}",
        specs={"image": ModalitySpec("image", (3, 16, 16)), "text": ModalitySpec("text", (BUCKETS,))},
        classes=tuple(meta["classes"]),
        x={"image": standardise(pictures, split[code] == 0), "text": hash_ngrams(texts, BUCKETS)},
        y=y[code],
        split=split[code],
        unit=code.astype(np.int64),
        present={"image": np.ones(len(code), dtype=np.bool_), "text": np.array([bool(t) for t in texts])},
        natural=client.astype(np.int64),
        natural_names=tuple(f"{vendors[v]}-{languages[k]}" for v, k in clients),
    )


def split_codes(y: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Split of each code point (0 train, 1 validation, 2 test): 70 / 10 / 20 % of every group, by the data seed."""
    rng = numpy_rng(DATA_SEED, "emoji9-codes")
    split = np.zeros(len(y), dtype=np.int8)
    for group in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == group))
        val, test = round(len(rows) * VAL_SHARE), round(len(rows) * TEST_SHARE)
        split[rows[:val]], split[rows[val : val + test]] = 1, 2
    return split


def _sizes(per_client: object, split: npt.NDArray[np.int8]) -> tuple[int, int, int]:
    most = int(np.sum(split == 0))
    if not isinstance(per_client, int) or isinstance(per_client, bool) or not 1 <= per_client <= most:
        raise ConfigError(
            f"{per_client!r} is not possible", where="data.params.per_client", remedy=f"use 1 to {most} code points"
        )
    val, test = max(1, round(per_client * VAL_PER_TRAIN)), max(1, round(per_client * TEST_PER_TRAIN))
    return per_client, val, test


def _field(line: str, text: str) -> str:
    label, _, tags = line.partition("\t")
    return label if text == "label" else tags
