"""cgmnist: gray digits and coloured digits whose colour gives the class away in training only.

The stress test of Fan et al. 2023 ("PMR", section 4): a joint model takes the colour shortcut and fails where
colours are random. Colours are random in validation too, as a model chosen on a shortcut would be no choice.
"""

from __future__ import annotations

import numpy as np

from fedmm.config.schema import DataConfig
from fedmm.data import container
from fedmm.data.common import DATA_SEED, EMBEDDED, check_options, choose_preset, standardise
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec

PRESETS = {"shortcut": None}
CLASSES = tuple("0123456789")
JITTER = 0.03
# One colour a class, far apart in RGB.
COLOURS = np.array(
    [
        [0.86, 0.08, 0.24],
        [0.00, 0.50, 0.50],
        [0.99, 0.91, 0.00],
        [0.00, 0.72, 0.92],
        [0.93, 0.57, 0.13],
        [0.57, 0.12, 0.94],
        [0.27, 0.94, 0.22],
        [0.94, 0.20, 0.90],
        [0.20, 0.20, 0.95],
        [0.65, 0.65, 0.65],
    ]
)


def load(cfg: DataConfig) -> Dataset:
    """Gray view [1,28,28] and colour view [3,28,28] of the same digit, 2,000 / 500 / 1,000 images.

    The colour is the class mean plus Gaussian jitter (0.03), multiplied into the digit; the class that lends its
    colour is the digit's own in training and uniformly random in validation and test.

    Raises:
        ConfigError: Unknown preset or parameter.
    """
    check_options(cfg, ())
    choose_preset(cfg, PRESETS, "shortcut")
    digits, _ = container.read(EMBEDDED / "digits.json")
    y, split = digits["labels"].astype(np.int64), digits["split"].astype(np.int8)
    rng = numpy_rng(DATA_SEED, "cgmnist")
    lender = np.where(split == 0, y, rng.integers(0, len(CLASSES), len(y)))
    colour = np.clip(COLOURS[lender] + rng.normal(0.0, JITTER, (len(y), 3)), 0.0, 1.0)
    gray = (digits["images"][:, None] / 255.0).astype(np.float32)
    train = split == 0
    x = {
        "gray": standardise(gray, train),
        "colour": standardise(gray * colour[:, :, None, None].astype(np.float32), train),
    }
    return Dataset(
        name="cgmnist",
        specs={"gray": ModalitySpec("image", (1, 28, 28)), "colour": ModalitySpec("image", (3, 28, 28))},
        classes=CLASSES,
        x=x,
        y=y,
        split=split,
        unit=np.arange(len(y), dtype=np.int64),
        present={m: np.ones(len(y), dtype=np.bool_) for m in x},
    )
