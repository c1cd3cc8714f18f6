"""An objective's own report reaches the server if it is declared, and is refused if it is not."""

from dataclasses import dataclass

import pytest
import torch

from experiments.runner import run
from fedmm.config.load import load_config
from fedmm.errors import RunError
from fedmm.metrics.fields import Field
from fedmm.objectives.joint import Joint

TINY = ["data.name=synthetic", "data.samples=300", "scenario.clients=4", "train.clients_per_round=4", "train.rounds=1"]


@dataclass(frozen=True)
class Silent(Joint):
    """Reports a count that it does not declare."""

    def end(self, model, data, state):
        return {"seen": torch.tensor(float(len(data)), dtype=torch.float64)}


@dataclass(frozen=True)
class Declared(Silent):
    """Declares it."""

    def report_fields(self, modalities, size):
        return {"seen": Field(())}


def one(kind, tmp_path):
    return run(load_config(None, [*TINY, f"objective.name={__name__}:{kind}"]).config, tmp_path)


def test_a_declared_report_is_admitted(tmp_path):
    assert one("Declared", tmp_path)["replies_used"] == 4


def test_an_undeclared_report_is_refused(tmp_path):
    with pytest.raises(RunError, match="seen, which was not asked for"):
        one("Silent", tmp_path)
