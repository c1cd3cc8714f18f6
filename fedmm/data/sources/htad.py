"""htad: sound and wrist movement of seven tasks at home.

Garcia-Ceja et al. 2021, "HTAD: A Home-Tasks Activities Dataset with wrist-accelerometer and audio features" (MMM);
the file comes with the Python package multiviewstacking. It names no person: the split follows the order of its rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import DataConfig
from fedmm.data.common import DATA_SEED, check_options, choose_preset, split_units, standardise
from fedmm.data.packages import Package
from fedmm.errors import DataError
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec

PACKAGE = Package("multiviewstacking", "0.7.5", "data")
FILE = "htad.csv"
PRESETS = {"blocks": None, "sessions": None}
COLUMNS = {"audio": "v1_", "accelerometer": "v2_"}
BLOCKS = 7  # of a recording: 4 train, 1 validates, 2 test


def load(cfg: DataConfig) -> Dataset:
    """Sound (12 cepstral coefficients of 3 slices of 1 s) [36] and accelerometer features [16] of 3 s; 7 classes.

    Presets: `blocks` (the default) cuts every recording into seven blocks of neighbouring rows, which are the units;
    `sessions` tests on the last session, which nothing else has seen, and cuts the others into blocks for training
    and validation.

    Raises:
        ConfigError: Unknown preset.
        DataError: The package is missing, or its file is not what it should be.
    """
    import pandas as pd  # every worker imports this module, and only this data set needs it

    check_options(cfg, (), root=True)
    name, _ = choose_preset(cfg, PRESETS, "blocks")
    path = PACKAGE.file(cfg, FILE)
    try:
        table = pd.read_csv(path)
        classes, y = np.unique(table["class"].to_numpy(dtype=str), return_inverse=True)
        features = {
            m: table[[c for c in table if str(c).startswith(prefix)]].to_numpy(dtype=np.float64)
            for m, prefix in COLUMNS.items()
        }
    except (ValueError, KeyError) as error:
        reason = f"there is no column {error}" if isinstance(error, KeyError) else error
        raise DataError(f"cannot be read: {reason}", where=str(path), remedy=PACKAGE.command) from error
    y = y.astype(np.int64)
    recording, session = recordings(y)
    unit = blocks(recording)
    rng = numpy_rng(DATA_SEED, "htad-blocks")
    split = np.concatenate([split_units(BLOCKS, rng) for _ in range(int(recording[-1]) + 1)])[unit]
    if name == "sessions":
        split = np.where(session == session[-1], 2, split == 1).astype(np.int8)
    return Dataset(
        name=f"htad:{name}",
        specs={m: ModalitySpec("vector", (values.shape[1],)) for m, values in features.items()},
        classes=tuple(classes.tolist()),
        x={m: standardise(values, split == 0, axes=0) for m, values in features.items()},
        y=y,
        split=split,
        unit=unit,
        present={m: np.ones(len(y), dtype=np.bool_) for m in features},
    )


def recordings(y: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Recording and session of each row, counted from 0: the file keeps the order in which it was recorded.

    A recording is a run of rows of one class. A session ends with the recording that completes the classes.
    """
    recording = np.cumsum(np.diff(y, prepend=y[:1]) != 0, dtype=np.int64)
    labels = y[np.searchsorted(recording, np.arange(recording[-1] + 1))]
    session, seen, number = np.zeros(len(labels), dtype=np.int64), set[int](), 0
    for k, label in enumerate(labels.tolist()):
        if len(seen) == len(np.unique(y)):
            seen, number = set(), number + 1
        seen.add(label)
        session[k] = number
    return recording, session[recording]


def blocks(recording: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Block of each row: every recording is cut into `BLOCKS` stretches of about equal length."""
    length = np.bincount(recording)
    start = np.cumsum(length) - length
    place: npt.NDArray[np.int64] = np.arange(len(recording)) - start[recording]
    return recording * BLOCKS + place * BLOCKS // length[recording]
