"""FedNova: clients that do more local steps do not pull the model further (Wang et al., NeurIPS 2020).

    ||a_k|| = [tau_k - rho (1 - rho^tau_k) / (1 - rho)] / (1 - rho)     tau_k steps of SGD with momentum rho
    p_k     = n_k / sum_j n_j
    w <- w + tau_eff sum_k p_k (w_k - w) / ||a_k||,     tau_eff = sum_k p_k ||a_k||

Block by block: all sums are over the clients that trained the block. With equal work it is FedAvg. As the change is
linear in the models, it is a mean with weights n_k / ||a_k|| and a step length:

    w <- w + tau_eff (sum_k p_k / ||a_k||) (mean - w)

Running statistics of normalisation are no parameters and take the plain mean. State: none. Messages: none besides the
model. The steps are those that clients report, as an objective may take several a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedmm.models.blocks import block_of, is_float
from fedmm.types import Tensors
from server.aggregation import Update, blockwise_mean
from server.strategies.base import Strategy, is_statistic, owners_of, part_of, widened


def normaliser(steps: int, momentum: float) -> float:
    """||a_k||: what `steps` equal gradients move a client, in learning rates; no steps count as one."""
    steps = max(steps, 1)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class FedNova(Strategy):
    """The normalised mean of the module's text.

    Attributes:
        momentum: rho, of the clients' optimiser: what `train.momentum` is.
    """

    reads_models: ClassVar[bool] = True
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what is no momentum."""
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must be in [0, 1), the value of train.momentum")

    def weight(self, samples: int, steps: int) -> float:
        """n_k / ||a_k||."""
        return samples / normaliser(steps, self.momentum)

    def aggregate(
        self, model: Tensors, updates: Sequence[Update], state: Tensors, min_owners: int
    ) -> tuple[Tensors, Tensors]:
        """The mean of normalised changes, and the step along it."""
        plain = {n: t for n, t in model.items() if is_statistic(n)}
        wide = widened({n: t for n, t in model.items() if n not in plain})
        mean = blockwise_mean(
            wide,
            part_of(updates, wide.__contains__),
            weight=lambda u: self.weight(u.samples, u.steps),
            min_owners=min_owners,
        )
        length = {b: self._length(us) for b, us in owners_of(updates, min_owners).items()}
        for name, old in wide.items():
            if is_float(old) and (block := block_of(name)) in length:
                mean[name] = old + length[block] * (mean[name] - old)
        mean |= blockwise_mean(plain, part_of(updates, plain.__contains__), min_owners=min_owners)
        return {n: mean[n].to(t.dtype) for n, t in model.items()}, state

    def _length(self, owners: Sequence[Update]) -> float:
        """tau_eff sum_k p_k / ||a_k|| of a block."""
        total = sum(u.samples for u in owners)
        work = sum(u.samples * normaliser(u.steps, self.momentum) for u in owners)
        return work * sum(self.weight(u.samples, u.steps) for u in owners) / total**2
