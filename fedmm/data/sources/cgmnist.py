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
JITTER_VARIANCE = 0.03
# One colour a class, after the Coloured MNIST of Kim et al. 2019 ("Learning not to learn").
COLOURS = (
    np.array(
        [
            [220, 20, 60],
            [0, 128, 128],
            [253, 233, 16],
            [0, 149, 182],
            [237, 145, 33],
            [145, 30, 188],
            [70, 240, 240],
            [250, 197, 187],
            [210, 245, 60],
            [128, 0, 0],
        ]
    )
    / 255.0
)


def load(cfg: DataConfig) -> Dataset:
    """Gray view [1,28,28] and colour view [3,28,28] of the same digit, 2,000 / 500 / 1,000 images.

    The colour is the class mean plus Gaussian jitter of variance 0.03, clipped, multiplied into the digit. The class
    that lends its colour is the digit's own in training and uniformly random in validation and test.

    Raises:
        ConfigError: Unknown preset or parameter.
    """
    check_options(cfg, ())
    choose_preset(cfg, PRESETS, "shortcut")
    digits, _ = container.read(EMBEDDED / "digits.json")
    y, split = digits["labels"].astype(np.int64), digits["split"].astype(np.int8)
    rng = numpy_rng(DATA_SEED, "cgmnist")
    lender = np.where(split == 0, y, rng.integers(0, len(CLASSES), len(y)))
    colour = np.clip(COLOURS[lender] + rng.normal(0.0, JITTER_VARIANCE**0.5, (len(y), 3)), 0.0, 1.0)
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
