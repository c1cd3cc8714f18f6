"""avdigits: a handwritten digit and a spoken digit of the same class.

The construction is AV-MNIST's (Vielzeuf et al. 2018, "CentralNet"): difficulty has two dials, the share of the
image's PCA energy that is removed and the noise on the speech. Speech comes from espeak-ng (embedded) or from a
folder of human recordings in the layout of the Free Spoken Digit Dataset (`data.root`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmm.config.schema import DataConfig
from fedmm.data import audio, container
from fedmm.data.common import DATA_SEED, EMBEDDED, check_options, choose, choose_preset, split_units, standardise
from fedmm.errors import DataError
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, ModalitySpec


@dataclass(frozen=True)
class Preset:
    """One difficulty.

    Attributes:
        speech: Embedded array to use: its noise was added before the spectrogram.
        snr_db: The same noise level for a user's recordings; None = clean.
        degraded: Keep only 25 % of the images' PCA energy.
    """

    speech: str
    snr_db: float | None
    degraded: bool


PRESETS = {
    "easy": Preset("clean", None, degraded=False),
    "imbalanced": Preset("noisy", -10.0, degraded=False),
    "reversed": Preset("clean", None, degraded=True),
    "avmnist": Preset("noisy", -10.0, degraded=True),
}
DEFAULT = "imbalanced"
CLASSES = tuple("0123456789")
LAYOUT = re.compile(r"(?P<digit>\d)_(?P<speaker>.+)_(?P<index>\d+)\.wav")


@dataclass(frozen=True)
class Speech:
    """Spoken digits: features uint8 [N, 21, 16], label, split, unit and natural client of each clip."""

    features: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]
    split: npt.NDArray[np.int8]
    unit: npt.NDArray[np.int64]
    natural: npt.NDArray[np.int64]
    natural_names: tuple[str, ...]


def load(cfg: DataConfig) -> Dataset:
    """Handwritten and spoken digits, paired at random within class and split: image [1,28,28], audio [1,21,16].

    `data.params.natural` names what a natural client is: "speaker" (the default) or, for the embedded speech,
    "accent". Images are split by image, speech by speaker; each image is used once.

    Raises:
        ConfigError: Unknown preset or parameter.
        DataError: A root folder without usable recordings.
    """
    check_options(cfg, ("natural",), root=True)
    name, preset = choose_preset(cfg, PRESETS, DEFAULT)
    speech = _embedded_speech(cfg, preset) if cfg.root is None else recorded_speech(Path(cfg.root), preset.snr_db)
    digits, _ = container.read(EMBEDDED / "digits.json")
    image_y = digits["labels"].astype(np.int64)
    image_rows, clip_rows = pair(image_y, digits["split"], speech.y, speech.split)
    split = digits["split"][image_rows].astype(np.int8)
    images = digits["images"]
    if preset.degraded:
        images = keep_leading_components(images, digits["pca_mean"], digits["pca_basis"])
    train = split == 0
    x = {
        "image": standardise(images[image_rows, None], train),
        "audio": standardise(speech.features[clip_rows, None], train),
    }
    return Dataset(
        name=f"avdigits:{name}",
        specs={"image": ModalitySpec("image", (1, 28, 28)), "audio": ModalitySpec("spectrogram", (1, 21, 16))},
        classes=CLASSES,
        x=x,
        y=image_y[image_rows],
        split=split,
        unit=speech.unit[clip_rows],
        present={m: np.ones(len(split), dtype=np.bool_) for m in x},
        natural=speech.natural[clip_rows],
        natural_names=speech.natural_names,
    )


def keep_leading_components(
    images: npt.NDArray[np.uint8], mean: npt.NDArray[np.float32], basis: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Images [N, 28, 28] projected on the basis [k, 784] around the mean [784]; values stay within 0 and 255."""
    flat = images.reshape(len(images), -1).astype(np.float64) - mean
    # einsum without BLAS: the bits must not depend on the number of threads.
    scores = np.einsum("nd,kd->nk", flat, basis.astype(np.float64), optimize=False)
    kept = mean + np.einsum("nk,kd->nd", scores, basis.astype(np.float64), optimize=False)
    clipped: npt.NDArray[np.float32] = np.clip(kept, 0, 255).astype(np.float32)
    return clipped.reshape(images.shape)


def pair(
    image_y: npt.NDArray[np.int64],
    image_split: npt.NDArray[np.int8],
    clip_y: npt.NDArray[np.int64],
    clip_split: npt.NDArray[np.int8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of images and rows of clips, paired at random within class and split by the fixed data seed.

    Each image is used once; clips are used equally often (once or not at all where there are enough). Images
    without a clip of their class and split are left out.
    """
    rng = numpy_rng(DATA_SEED, "avdigits-pairs")
    partner = np.full(len(image_y), -1, dtype=np.int64)
    for split in (0, 1, 2):
        for label in range(len(CLASSES)):
            images = np.flatnonzero((image_y == label) & (image_split == split))
            clips = np.flatnonzero((clip_y == label) & (clip_split == split))
            if len(clips):
                rounds = -(-len(images) // len(clips))
                partner[images] = np.concatenate([rng.permutation(clips) for _ in range(rounds)])[: len(images)]
    rows = np.flatnonzero(partner >= 0)
    return rows, partner[rows]


def _embedded_speech(cfg: DataConfig, preset: Preset) -> Speech:
    natural = choose(cfg, "natural", ("speaker", "accent"), "speaker")
    arrays, meta = container.read(EMBEDDED / "speech.json")
    speaker = arrays["speaker"].astype(np.int64)
    by_speaker = split_units(len(meta["speakers"]), numpy_rng(DATA_SEED, "avdigits-speakers"))
    return Speech(
        features=arrays[preset.speech],
        y=arrays["labels"].astype(np.int64),
        split=by_speaker[speaker],
        unit=speaker,
        natural=arrays[natural].astype(np.int64),
        natural_names=tuple(meta[f"{natural}s"]),
    )


def recorded_speech(root: Path, snr_db: float | None) -> Speech:
    """Recordings `root/recordings/{digit}_{speaker}_{index}.wav`, featurised like the embedded speech.

    Three or more speakers are split by speaker; with fewer, by recording index, and then a speaker is in every
    split. Noise is drawn from the data seed, in the order of the sorted file names.

    Raises:
        DataError: No such folder, no recordings, an unreadable file, a digit that nobody speaks, or too few to split.
    """
    folder = root / "recordings"
    remedy = "data.root must hold recordings/{digit}_{speaker}_{index}.wav, e.g. recordings/7_jackson_32.wav"
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder), remedy=remedy)
    found = sorted(
        ((path, match) for path in folder.iterdir() if (match := LAYOUT.fullmatch(path.name))),
        key=lambda entry: entry[0].name,
    )
    if not found:
        raise DataError("no recording has a name of the right form", where=str(folder), remedy=remedy)
    y = np.array([int(match["digit"]) for _, match in found])
    if absent := sorted(set(range(10)) - set(y.tolist())):
        raise DataError(f"no recording of the digits {absent}", where=str(folder), remedy="add at least one of each")
    names = sorted({match["speaker"] for _, match in found})
    speaker = np.array([names.index(match["speaker"]) for _, match in found])
    index = np.unique([int(match["index"]) for _, match in found], return_inverse=True)[1]
    unit = speaker if len(names) >= 3 else index
    if (units := int(unit.max()) + 1) < 3:
        raise DataError(
            f"{len(names)} speakers with {units} recordings of a digit cannot be split in three",
            where=str(folder),
            remedy="give at least 3 speakers, or at least 3 recordings of each digit",
        )
    waves = np.stack([audio.read_wav(path) for path, _ in found])
    if snr_db is not None:
        waves = audio.add_noise(waves, snr_db, numpy_rng(DATA_SEED, "avdigits-recorded-noise"))
    return Speech(
        features=audio.log_mel(waves),
        y=y,
        split=split_units(units, numpy_rng(DATA_SEED, "avdigits-speakers"))[unit],
        unit=unit,
        natural=speaker,
        natural_names=tuple(names),
    )
