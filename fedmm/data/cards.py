"""What a person reads about a data set: its card, and a picture of some samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmm.data.common import EMBEDDED
from fedmm.errors import ConfigError, nearest
from fedmm.types import Dataset, ModalitySpec

CARDS = EMBEDDED / "cards"
PICTURES = (".png", ".jpg", ".pdf", ".svg")


def describe(name: str) -> str:
    """The data card of a data set as Markdown: source, licence, construction, sizes, hashes, known facts.

    Raises:
        ConfigError: No such card.
    """
    path = CARDS / f"{name}.md"
    if not path.is_file():
        known = [card.stem for card in sorted(CARDS.glob("*.md"))]
        raise ConfigError(f"no data card for {name!r}", where="data card", remedy=nearest(name, known))
    return path.read_text(encoding="utf-8")


def preview(dataset: Dataset, path: Path, columns: int = 10) -> Path:
    """Draw one training sample of each of the first `columns` classes, a row a modality, and save it to `path`.

    Raises:
        ConfigError: The path does not end as a picture's does.
    """
    if path.suffix not in PICTURES:
        raise ConfigError("is no picture file", where=str(path), remedy=f"choose from: {', '.join(PICTURES)}")
    labels = range(min(columns, len(dataset.classes)))
    shown = [_first(dataset, label) for label in labels]
    figure = Figure(figsize=(1.3 * len(shown), 1.5 * len(dataset.specs) + 0.4), layout="constrained")
    grid = figure.subplots(len(dataset.specs), len(shown), squeeze=False)
    for row, (name, spec) in zip(grid, dataset.specs.items(), strict=True):
        for axis, label, sample in zip(row, labels, shown, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if sample is not None and dataset.present[name][sample]:
                _draw(axis, spec, dataset.x[name][sample])
            if axis in grid[0]:
                axis.set_title(dataset.classes[label], fontsize=9)
        row[0].set_ylabel(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _first(dataset: Dataset, label: int) -> int | None:
    rows = np.flatnonzero((dataset.split == 0) & (dataset.y == label))
    return int(rows[0]) if len(rows) else None


def _draw(axis: Axes, spec: ModalitySpec, x: npt.NDArray[np.float32]) -> None:
    if spec.kind == "spectrogram":
        axis.imshow(x[0].T, origin="lower", aspect="auto")
    elif spec.kind == "image":
        low, high = float(x.min()), float(x.max())
        picture = ((x - low) / (high - low if high > low else 1.0)).transpose(1, 2, 0)
        axis.imshow(picture if picture.shape[2] == 3 else picture[:, :, 0], cmap="gray")
    else:
        axis.plot(x.reshape(-1), linewidth=0.5)
