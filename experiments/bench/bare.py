"""The bare loop: the same clients trained one after another by plain PyTorch, without any federation.

One module, reset in place for each client; a fresh `torch.optim.SGD`; batches from the streams of the run's seed;
the mean of the clients' weights as a weighted sum in float64. Whatever a framework does beyond this is overhead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.bench.plain import TwoTowers
from experiments.bench.workloads import Precision, Workload
from fedmm import seeding
from fedmm.config.schema import Config
from fedmm.data.federation import build_federation
from fedmm.types import Tensors
from server.knowledge import Federates
from server.plan import Plan, plan
from server.selection import Situation


@dataclass(frozen=True)
class Setting:
    """A workload laid out for those who do not know fedmm.

    Attributes:
        workload: What it is.
        config: Its configuration.
        network: Arguments of `TwoTowers`.
        clients: Training data of each client: one tensor a modality, and labels.
        initial: Initial weights by fedmm's names, in the order of `TwoTowers`' parameters.
        picks: Clients of each round, sorted; the first entry is round 1.
    """

    workload: Workload
    config: Config
    network: dict[str, object]
    clients: list[tuple[Tensor, ...]]
    initial: Tensors
    picks: list[list[int]]

    def epochs(self, round: int, client: int) -> Iterator[Tensor]:
        """The order of the client's samples in each local epoch, int64 [N]."""
        generator = seeding.torch_rng(self.config.seed, "batches", round, client)
        for _ in range(self.config.train.local_epochs):
            yield torch.randperm(len(self.clients[client][-1]), generator=generator)


def lay_out(workload: Workload, rounds: int, precision: Precision = "float32") -> Setting:
    """Data, initial weights and the clients of each round, as a run of fedmm would have them."""
    config = workload.config({"name": "inproc"}, rounds)
    prepared = plan(config)
    federation = build_federation(prepared.dataset, config.scenario, config.seed)
    dtype = getattr(torch, precision)
    clients: list[tuple[Tensor, ...]] = []
    for k in range(workload.registered):
        data = federation.client(k, "train")
        clients.append((*(x.to(dtype) for x in data.x.values()), data.y))
    network: dict[str, object] = {
        "family": workload.family,
        "shapes": [list(spec.shape) for spec in prepared.dataset.specs.values()],
        "width": workload.width or {"mlp": 128, "cnn": 8}[workload.family],
        "features": workload.features,
        "classes": len(prepared.dataset.classes),
    }
    initial = {n: t.detach().to(dtype) for n, t in prepared.model.state_dict().items()}
    sizes = tuple(len(client[-1]) for client in clients)
    return Setting(workload, config, network, clients, initial, _picks(prepared, federation.owned, sizes, rounds))


def _picks(prepared: Plan, owned: tuple[tuple[str, ...], ...], sizes: tuple[int, ...], rounds: int) -> list[list[int]]:
    federates = Federates(prepared.dataset.modalities, owned, sizes)
    found = []
    for round in range(1, rounds + 1):
        situation = Situation(round, tuple(range(len(sizes))), federates, {}, lambda clients: {})
        rng = seeding.numpy_rng(prepared.config.seed, "selection", round)
        picks = prepared.selector.select(situation, prepared.config.train.clients_per_round, rng)
        found.append(sorted(pick.client for pick in picks))
    return found


class BareLoop:
    """Trains a setting round by round.

    Args:
        setting: Clients, initial weights, order.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model = TwoTowers(**setting.network)  # type: ignore[arg-type]
        self._model.to(next(iter(setting.initial.values())).dtype)
        self._parameters = [p.detach() for p in self._model.parameters()]
        for own, (name, given) in zip(self._parameters, setting.initial.items(), strict=True):
            if own.shape != given.shape:
                raise ValueError(f"{name} is {tuple(given.shape)}, the plain network has {tuple(own.shape)}")
        self._global = [t.clone() for t in setting.initial.values()]

    @property
    def weights(self) -> Tensors:
        """The global model by fedmm's names."""
        return dict(zip(self._setting.initial, self._global, strict=True))

    def round(self, number: int) -> int:
        """Train the clients of one round (from 1), take the mean, and return how many samples they have."""
        train = self._setting.config.train
        total, sums = 0, [torch.zeros_like(t, dtype=torch.float64) for t in self._global]
        for client in self._setting.picks[number - 1]:
            data = self._setting.clients[client]
            torch._foreach_copy_(self._parameters, self._global)
            optimiser = torch.optim.SGD(self._model.parameters(), train.lr, train.momentum, foreach=True)
            for order in self._setting.epochs(number, client):
                for rows in torch.split(order, train.batch_size):
                    optimiser.zero_grad()
                    self._model.loss(*(tensor[rows] for tensor in data)).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
            samples = len(data[-1])
            total += samples
            for s, p in zip(sums, self._parameters, strict=True):
                s.add_(p.to(torch.float64), alpha=samples)
        self._global = [(s / total).to(t.dtype) for s, t in zip(sums, self._global, strict=True)]
        return total


def for_strangers(setting: Setting) -> dict[str, npt.NDArray[np.generic]]:
    """The setting as flat arrays, for a process that has none of fedmm's dependencies.

    Returns:
        "x<j>" and "y" of all clients one after another, "sizes" [K], "weight<i>", "picks" [R, m], and "orders": each
        round's clients' epochs one after another.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {"sizes": np.array([len(c[-1]) for c in setting.clients])}
    for j in range(len(setting.clients[0]) - 1):
        arrays[f"x{j}"] = torch.cat([client[j] for client in setting.clients]).numpy()
    arrays["y"] = torch.cat([client[-1] for client in setting.clients]).numpy()
    arrays |= {f"weight{i}": t.numpy() for i, t in enumerate(setting.initial.values())}
    arrays["picks"] = np.array(setting.picks)
    orders = [
        order for round, clients in enumerate(setting.picks, 1) for k in clients for order in setting.epochs(round, k)
    ]
    arrays["orders"] = torch.cat(orders).numpy()
    return arrays
