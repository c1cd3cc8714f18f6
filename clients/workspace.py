"""What a client process keeps between messages: data set, federation, model and objective of a specification.

Keyed by the specification's text and, for data, by the partition index: one process serves many clients. Nothing
that a client learns is kept here; every reply is a function of the message alone.
"""

from __future__ import annotations

import json
from functools import lru_cache

from flwr.app import ArrayRecord

from fedmm.config.schema import Config
from fedmm.data import load_dataset
from fedmm.data.federation import Federation, build_federation
from fedmm.models import MultimodalModel, build_model
from fedmm.objectives import Objective, build_objective
from fedmm.types import ClientData, Tensors
from fedmm.wire import from_record


class Workspace:
    """Everything a process needs to act for any client of one specification.

    Args:
        spec: `fedmm.spec.client_spec` of the run.
        root: Folder of the device's own data files, instead of the specification's `data.root`.
    """

    def __init__(self, spec: str, root: str | None) -> None:
        raw = json.loads(spec)
        if root:
            raw["data"]["root"] = root
        self.config = Config.model_validate(raw)
        self.dataset = load_dataset(self.config.data)
        self.federation: Federation = build_federation(self.dataset, self.config.scenario, self.config.seed)
        self.model: MultimodalModel = build_model(
            self.dataset.specs, len(self.dataset.classes), self.config.model, self.config.seed
        )
        self.objective: Objective = build_objective(self.config.objective)
        self._data: dict[tuple[int, str], ClientData] = {}
        self._decoded: tuple[ArrayRecord, Tensors] | None = None

    def data(self, client: int, split: str) -> ClientData:
        """One split of one client, made once."""
        key = (client, split)
        if key not in self._data:
            self._data[key] = self.federation.client(client, split)
        return self._data[key]

    def load(self, record: ArrayRecord) -> MultimodalModel:
        """The model with received weights; blocks that were not sent keep whatever they held and must not be used.

        Clients of one round share the record, so it is decoded once a round.
        """
        if self._decoded is None or self._decoded[0] is not record:
            self._decoded = (record, from_record(record))
        self.model.load_state_dict(self._decoded[1], strict=False)
        return self.model


@lru_cache(maxsize=2)
def workspace(spec: str, root: str | None) -> Workspace:
    """The process's workspace of a specification."""
    return Workspace(spec, root)
