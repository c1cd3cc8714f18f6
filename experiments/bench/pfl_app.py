"""The same rounds on pfl's simulator, in one process: `python -m experiments.bench.pfl_app JOB.json RESULT.json`.

Runs in pfl's own virtual environment: pfl's FederatedAveraging with weights by data points, its simulated backend,
a central SGD with rate 1, and data sets that give each epoch in the order of the job's arrays.
"""

# mypy: disable-error-code="import-not-found,misc"
# pfl is installed in its own environment alone, so that its types are unknown here.
from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from experiments.bench.plain import TwoTowers
from experiments.bench.stopwatch import Stopwatch

NEVER = 10**9
EVALUATION = 10**9
"""A batch size that only evaluation has; pfl evaluates in its first round, whatever the frequency."""


class Network(TwoTowers):
    """The plain network with what pfl wants of a module."""

    def metrics(self, *batch: Tensor) -> dict[str, Weighted]:
        """Loss of a batch; asked for in the first round alone, which is not timed."""
        return {"loss": Weighted(float(self.loss(*batch).detach()) * len(batch[-1]), len(batch[-1]))}


class Ordered(Dataset):
    """A client's tensors whose epochs follow given orders."""

    def __init__(self, tensors: tuple[Tensor, ...], client: int) -> None:
        super().__init__(tensors, user_id=str(client))
        self.orders: Iterator[Tensor] = iter(())

    def iter(self, batch_size: int) -> Iterator[Any]:
        """Batches of the next epoch; all samples at once, in their own order, for the evaluation."""
        if batch_size == EVALUATION:
            yield self.raw_data
            return
        for rows in torch.split(next(self.orders), batch_size):
            yield tuple(tensor[rows] for tensor in self.raw_data)


class Watch(TrainingProcessCallback):
    """Laps of the stopwatch; says stop when it has enough."""

    def __init__(self, stopwatch: Stopwatch, samples: list[int]) -> None:
        self._stopwatch, self._samples = stopwatch, samples
        self.first: list[Any] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """See pfl."""
        enough = self._stopwatch.lap(self._samples[central_iteration])
        if central_iteration == 0:
            self.first = [p.detach().numpy().copy() for p in model.pytorch_model.parameters()]
        return enough, Metrics()


def main(job_path: Path, result_path: Path) -> None:
    """Run a job and write what the stopwatch says, and the weights."""
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 - pfl draws from the global generator
    job = json.loads(job_path.read_text())
    arrays = np.load(job["arrays"])
    edges = np.concatenate([[0], np.cumsum(arrays["sizes"])])
    parts = [torch.from_numpy(arrays[name]) for name in (*sorted(n for n in arrays if n[0] == "x"), "y")]
    clients = [Ordered(tuple(part[a:b] for part in parts), k) for k, (a, b) in enumerate(pairwise(edges.tolist()))]
    network = Network(**job["network"])
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.from_numpy(arrays[f"weight{i}"]))
    picks, orders, epochs = arrays["picks"], torch.from_numpy(arrays["orders"]), int(job["epochs"])
    place = 0
    schedule: list[tuple[int, list[Tensor]]] = []
    for client in picks.reshape(-1).tolist():
        size = len(clients[client])
        schedule.append((client, [orders[place + e * size : place + (e + 1) * size] for e in range(epochs)]))
        place += epochs * size
    turns = iter(schedule)

    def make(turn: tuple[int, list[Tensor]]) -> Ordered:
        clients[turn[0]].orders = iter(turn[1])
        return clients[turn[0]]

    stopwatch = Stopwatch(job["warmup"], job["rounds"], job["budget"])
    model = PyTorchModel(
        network,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, job["momentum"], foreach=True),
        torch.optim.SGD(network.parameters(), 1.0),
    )
    watch = Watch(stopwatch, [int(arrays["sizes"][row].sum()) for row in picks])
    data = FederatedDataset(make, lambda: next(turns))
    FederatedAveraging().run(
        NNAlgorithmParams(len(picks), NEVER, picks.shape[1], None),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=job["batch_size"], local_num_epochs=epochs, local_learning_rate=job["lr"]),
        NNEvalHyperParams(EVALUATION),
        [watch],
        send_metrics_to_platform=False,
    )
    np.savez(job["weights"], *watch.first)
    result_path.write_text(json.dumps(stopwatch.result() | {"torch": torch.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
