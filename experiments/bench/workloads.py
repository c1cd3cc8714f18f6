"""What is timed: two small multimodal networks on random data over clients of log-normal sizes.

    mlp   vectors of 64 and 128; each encoder Linear(128) ReLU Linear(64); fusion Linear(64) ReLU; 10 classes
    cnn   image 28 x 28 and spectrogram 20 x 44; each encoder two 3x3 convolutions (8 and 16 channels), each followed
          by ReLU and max-pooling, then Linear(64); the same fusion

50,250 and 118,026 parameters. The size of the mlp can be raised by its widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import numpy as np

from fedmm.config.layers import Layer, flatten
from fedmm.config.load import resolve
from fedmm.config.schema import Config, DataConfig
from fedmm.data.common import DATA_SEED
from fedmm.seeding import numpy_rng
from fedmm.types import Dataset, Kind, ModalitySpec

Family = Literal["mlp", "cnn"]
Precision = Literal["float32", "float64"]

CLASSES = 10
HELDOUT = 20
"""Validation and test samples: a data set must have some, but nothing is evaluated here."""

SIGMA = 0.5
"""Standard deviation of the logarithm of clients' sizes: the largest of a hundred has about three times the mean."""

SHAPES: dict[Family, dict[str, tuple[Kind, tuple[int, ...]]]] = {
    "mlp": {"first": ("vector", (64,)), "second": ("vector", (128,))},
    "cnn": {"first": ("image", (1, 28, 28)), "second": ("spectrogram", (1, 20, 44))},
}
ENCODER = {"mlp": "mlp", "cnn": "convnet"}


@dataclass(frozen=True)
class Workload:
    """One federation and one model.

    Attributes:
        name: How tables call it.
        family: mlp or cnn.
        sampled: Clients that train in a round.
        samples: Mean number of training samples a client.
        registered: Clients in all.
        method: Preset; fedavg is what every contestant can do.
        width: Hidden width of the mlp's encoders, or base channels of the cnn (None: 128, or 8).
        features: Width of the features and of the fusion.
        norm: Of the encoders; methods that compare features with prototypes need a scale, hence "group".
    """

    name: str
    family: Family
    sampled: int
    samples: int
    registered: int = 100
    method: str = "fedavg"
    width: int | None = None
    features: int = 64
    norm: Literal["none", "group"] = "none"

    @property
    def plain(self) -> bool:
        """Whether a loop or a framework that knows nothing of fedmm can do the same."""
        return self.method == "fedavg" and self.norm == "none"

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample as a client holds it: numbers, whether each modality is there, and the label."""
        return sum(4 * prod(shape) + 1 for _, shape in SHAPES[self.family].values()) + 8

    def config(self, engine: dict[str, Any], rounds: int, precision: Precision = "float32") -> Config:
        """The run's configuration; neither evaluation nor checkpoint falls into the first `rounds` rounds.

        Args:
            engine: The `engine` section.
            rounds: Rounds that will be looked at.
            precision: Of model and data.
        """
        train = {
            "rounds": rounds + 1,
            "clients_per_round": self.sampled,
            "local_epochs": 2,
            "batch_size": 32,
            "lr": 0.05,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "precision": precision,
        }
        values: dict[str, Any] = {
            "method": self.method,
            "data": {
                "name": f"experiments.bench.workloads:{self.family}",
                "params": {"samples": self.registered * self.samples},
            },
            "scenario": {"clients": self.registered, "partition": {"name": "quantity", "sigma": SIGMA}},
            "model": {
                "encoder": ENCODER[self.family],
                "norm": self.norm,
                "fusion": "mlp",
                "features": self.features,
                "width": self.width,
            },
            "train": train,
            "evaluate": {"every": rounds + 1, "probe": False},
            "checkpoint": {"every": rounds + 1},
            "engine": engine,
        }
        return resolve([Layer("benchmark", flatten(values, "benchmark"))]).config


def mlp(cfg: DataConfig) -> Dataset:
    """Two vectors a sample around a class's centre; `params.samples` of them train."""
    return _random("mlp", int(cfg.params["samples"]))


def cnn(cfg: DataConfig) -> Dataset:
    """An image and a spectrogram a sample around a class's centre; `params.samples` of them train."""
    return _random("cnn", int(cfg.params["samples"]))


def _random(family: Family, samples: int) -> Dataset:
    rng = numpy_rng(DATA_SEED, f"bench/{family}")
    n = samples + 2 * HELDOUT
    y = rng.integers(0, CLASSES, n)
    x = {}
    for name, (_, shape) in SHAPES[family].items():
        centres = rng.standard_normal((CLASSES, *shape), dtype=np.float32)
        x[name] = rng.standard_normal((n, *shape), dtype=np.float32) + 0.5 * centres[y]
    split = np.zeros(n, dtype=np.int8)
    split[samples:], split[samples + HELDOUT :] = 1, 2
    return Dataset(
        name=f"bench:{family}",
        specs={name: ModalitySpec(kind, shape) for name, (kind, shape) in SHAPES[family].items()},
        classes=tuple(f"c{c}" for c in range(CLASSES)),
        x=x,
        y=y,
        split=split,
        unit=np.arange(n, dtype=np.int64),
        present={name: np.ones(n, dtype=np.bool_) for name in x},
    )


MLP_SMALL = Workload("mlp 20 x 33", "mlp", 20, 33)
HEADLINE = (
    Workload("mlp 100 x 33", "mlp", 100, 33),
    Workload("mlp 20 x 172", "mlp", 20, 172),
    Workload("cnn 20 x 46", "cnn", 20, 46),
)
METHODS = tuple(
    Workload(f"{method} 100 x 33", "mlp", 100, 33, method=method, norm="group")
    for method in ("fedavg", "fedcmi", "cmsfed")
)
SAMPLED = tuple(Workload(f"{k} clients", "mlp", k, 33, registered=1000) for k in (10, 100, 300, 1000))
LARGE = tuple(
    Workload(f"{k:,} of {n:,}", "mlp", k, 33, registered=n)
    for k, n in ((100, 1000), (100, 10_000), (300, 10_000), (1000, 10_000))
)
SIZES = tuple(
    replace(MLP_SMALL, name=f"{name} parameters", width=width, features=features)
    for name, width, features in (("0.05 M", 128, 64), ("1 M", 1024, 320), ("11 M", 4096, 1024))
)
SAMPLES = tuple(replace(MLP_SMALL, name=f"{n} samples", samples=n) for n in (16, 66, 500))
