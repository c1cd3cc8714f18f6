"""What a client process keeps between messages: data set, federation, model and objective of a specification.

Keyed by the specification's text: one process serves many clients. Nothing that a client learns is kept here; every
reply is a function of the message alone.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fedmm import native
from fedmm.config.schema import Config
from fedmm.data import load_dataset
from fedmm.data.federation import Pool, build_federation
from fedmm.data.layout import layout, open_layout
from fedmm.errors import ConfigError
from fedmm.models import MultimodalModel, build_model
from fedmm.models.stacked import Stack, Unstackable
from fedmm.objectives import Objective, build_objective
from fedmm.types import ClientData, Tensors
from fedmm.wire import from_record

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

NARROW = 32
"""Channels up to which our convolutions of a client, with what follows them, are about as fast on a CPU as PyTorch's or
faster (measured)."""


class Workspace:
    """Everything a process needs to act for any client of one specification.

    Args:
        spec: `fedmm.spec.client_spec` of the run.
        root: Folder of the device's own data files, instead of the specification's `data.root`.
        home: Folder where the samples have been laid out (`fedmm.data.layout`), instead of loading the data set.

    Attributes:
        stack: The model's stacked twin, or None if clients train one by one.
        why_alone: The reason for that.
        device: Where clients train.
    """

    def __init__(self, spec: str, root: str | None, home: str | None = None) -> None:
        raw = json.loads(spec)
        if root:
            raw["data"]["root"] = root
        self.config = Config.model_validate(raw)
        if home is None:
            dataset = load_dataset(self.config.data)
            self.layout = layout(build_federation(dataset, self.config.scenario, self.config.seed))
        else:
            self.layout = open_layout(home)
        self.dtype = torch.float64 if self.config.train.precision == "float64" else torch.float32
        self.device = torch.device(self.config.engine.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("PyTorch finds no GPU", where="engine.device", remedy="use engine.device=cpu")
        built = build_model(self.layout.specs, self.layout.classes, self.config.model, self.config.seed)
        # Channels last: convolutions of a single client are half as fast again on a CPU.
        self.model: MultimodalModel = built.to(self.device, self.dtype)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._tensors: Tensors = self.model.state_dict()
        self.objective: Objective = build_objective(self.config.objective)
        self.stack, self.why_alone = self._stack()
        self._pools: dict[str, Pool] = {}
        self._data: dict[tuple[int, str], ClientData] = {}
        self._decoded: tuple[ArrayRecord, Tensors] | None = None

    def _stack(self) -> tuple[Stack | None, str]:
        if self.config.scenario.clients == 1:
            return None, "there is only one client"
        if not self.objective.stackable():
            reason = f": {self.objective.alone}" if self.objective.alone else ""
            return None, f"{type(self.objective).__name__} does not stack{reason}"
        try:
            stack = Stack(self.model)
        except Unstackable as reason:
            return None, str(reason)
        return stack, ""

    def stack_for(self, cohort: int) -> Stack | None:
        """The twin that clients train with in stacks of `cohort`, or None: the plain model.

        A single client trains with it, too, as it comes out with the same bits then; but on a CPU PyTorch's
        convolutions of a single client, which sum in another order, are the faster ones if there are many channels.
        """
        plain = cohort == 1 and self.device.type == "cpu" and self.stack is not None and not self._narrow
        return None if plain else self.stack

    @property
    def _narrow(self) -> bool:
        """Whether no convolution is better left to PyTorch."""
        assert self.stack is not None
        ours = native.library is not None and self.dtype != torch.bfloat16
        return self.stack.channels <= (NARROW if ours else 0)

    def use(self, dtype: torch.dtype) -> None:
        """Train in another number format from now on."""
        self.dtype = dtype
        self.model.to(dtype)
        self._tensors = self.model.state_dict()
        self._pools.clear()
        self._data.clear()

    def pool(self, split: str) -> Pool:
        """One split of all clients, on the device and in the precision of training."""
        if split not in self._pools:
            self._pools[split] = self.layout.pools[split].to(self.device, self.dtype)
        return self._pools[split]

    def data(self, client: int, split: str) -> ClientData:
        """One split of one client; shares memory with the pool."""
        key = (client, split)
        if key not in self._data:
            self._data[key] = self.pool(split).client(client)
        return self._data[key]

    def decode(self, record: ArrayRecord) -> Tensors:
        """The tensors of a model record; clients of one round share the record, so it is decoded once a round."""
        if self._decoded is None or self._decoded[0] is not record:
            self._decoded = (record, {n: t.to(self.device) for n, t in from_record(record).items()})
        return self._decoded[1]

    def load(self, received: Tensors) -> MultimodalModel:
        """The model with received weights; blocks that were not sent keep whatever they held and must not be used."""
        names = [n for n in received if n in self._tensors]
        torch._foreach_copy_([self._tensors[n] for n in names], [received[n] for n in names])
        return self.model


@lru_cache(maxsize=2)
def workspace(spec: str, root: str | None, home: str | None = None) -> Workspace:
    """The process's workspace of a specification."""
    return Workspace(spec, root, home)
