"""A data set of the user's own in which samples lack a modality: `params.fill` is what lies in the holes."""

from dataclasses import replace

import numpy as np

from fedmm.config.schema import DataConfig
from fedmm.data import load_dataset


def load(cfg):
    inner = DataConfig(name="synthetic", params={k: v for k, v in cfg.params.items() if k != "fill"})
    base = load_dataset(inner)
    rng = np.random.default_rng(5)
    lost = rng.integers(0, 3 * len(base.modalities), len(base.y))
    present = {m: lost != j for j, m in enumerate(base.modalities)}
    x = {m: base.x[m].copy() for m in base.modalities}
    for m in x:
        x[m][~present[m]] = {"nan": np.nan, "zero": 0.0, "huge": 1e30}[cfg.params["fill"]]
    return replace(base, name="holed", x=x, present=present)
