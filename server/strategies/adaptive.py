"""FedAdagrad, FedYogi and FedAdam: an adaptive optimiser on the server (Reddi et al., ICLR 2021, algorithm 2).

    Delta = sum_k n_k (w_k - w) / sum_k n_k                   the pseudo-gradient
    m <- beta_1 m + (1 - beta_1) Delta                         beta_1 = 0 in FedAdagrad
    v <- v + Delta^2                                           FedAdagrad
    v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)            FedYogi
    v <- beta_2 v + (1 - beta_2) Delta^2                       FedAdam
    w <- w + eta m / (sqrt(v) + tau)

Block by block: Delta of a block is over the clients that trained it, and a block that nobody trained keeps its value,
its moments and its clock; so does each entry that nobody held, where clients hold parts of the width. Flower has the
same rules and defaults for whole models in its own messages: there, old momentum would move an encoder whose owners
are all absent.
Running statistics of normalisation are no parameters and take the plain mean.

State: "m.<tensor>", "v.<tensor>", from zero as in Flower, and "rounds.<block>". Messages: none besides the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from fedmm.models.blocks import block_of, blocks_of, is_float
from fedmm.models.width import padded
from fedmm.types import Tensors
from server.aggregation import Update, blockwise_mean
from server.knowledge import Federates
from server.strategies.base import Strategy, is_statistic, owners_of, widened


@dataclass(frozen=True)
class FedAdagrad(Strategy):
    """Squared pseudo-gradients add up: the steps become ever shorter.

    Attributes:
        eta: Server learning rate.
        tau: Degree of adaptivity: the smaller, the more alike the steps of all entries.
    """

    reads_models: ClassVar[bool] = False
    eta: float = 0.1
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what makes no step."""
        if not (self.eta > 0 and self.tau > 0):
            raise ValueError("eta and tau must be above 0")

    def begin(self, model: Tensors, federates: Federates) -> Tensors:
        """Moments of zero."""
        moving = [n for n, t in model.items() if _optimised(n, t)]
        state = {f"{kind}.{n}": torch.zeros_like(model[n]) for kind in ("m", "v") for n in moving}
        return state | {f"rounds.{block}": torch.tensor(0) for block in blocks_of(model)}

    def aggregate(
        self, model: Tensors, updates: Sequence[Update], state: Tensors, min_owners: int
    ) -> tuple[Tensors, Tensors]:
        """One step of the server's optimiser on every block that was trained."""
        # In double precision: next to a small tau, the rounding of a mean would be a step.
        mean, after = blockwise_mean(widened(model), updates, min_owners=min_owners), dict(state)
        result = {n: t.to(model[n].dtype) for n, t in mean.items()}
        owners = owners_of(updates, min_owners)
        for block in owners:
            after[f"rounds.{block}"] = state[f"rounds.{block}"] + 1
        for name, old in model.items():
            block = block_of(name)
            if block not in owners or not _optimised(name, old):
                continue
            before = old, state[f"m.{name}"], state[f"v.{name}"]
            w, m, v = (t.to(torch.float64) for t in before)
            delta = mean[name] - w
            m, v = self.first(m, delta), self.second(v, delta.square())
            w = w + self.rate(int(after[f"rounds.{block}"])) * m / (v.sqrt() + self.tau)
            fresh = tuple(t.to(old.dtype) for t in (w, m, v))
            if any(name in u.held for u in owners[block]):
                held = _held(name, old, owners[block])
                fresh = tuple(torch.where(held, new, kept) for new, kept in zip(fresh, before, strict=True))
            result[name], after[f"m.{name}"], after[f"v.{name}"] = fresh
        return result, after

    def first(self, m: Tensor, delta: Tensor) -> Tensor:
        """The next m."""
        return delta

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v, from Delta^2."""
        return v + square

    def rate(self, rounds: int) -> float:
        """Server learning rate of a block that has now been trained in `rounds` rounds."""
        return self.eta


@dataclass(frozen=True)
class FedYogi(FedAdagrad):
    """Adam whose second moment changes by no more than the squared pseudo-gradient.

    Attributes:
        eta: Server learning rate.
        tau: Degree of adaptivity.
        beta_1: Decay of the first moment.
        beta_2: Decay of the second moment.
    """

    eta: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse moments that do not decay."""
        super().__post_init__()
        if not (0 <= self.beta_1 < 1 and 0 <= self.beta_2 < 1):
            raise ValueError("beta_1 and beta_2 must be in [0, 1)")

    def first(self, m: Tensor, delta: Tensor) -> Tensor:
        """Momentum."""
        return self.beta_1 * m + (1 - self.beta_1) * delta

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Towards Delta^2 by a step of its own size."""
        return v - (1 - self.beta_2) * square * torch.sign(v - square)


@dataclass(frozen=True)
class FedAdam(FedYogi):
    """Adam on the pseudo-gradient.

    Attributes:
        eta: Server learning rate.
        tau: Degree of adaptivity.
        beta_1: Decay of the first moment.
        beta_2: Decay of the second moment.
        bias_correction: eta times sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)) in a block's t-th round (from 1), as in
            Flower; without it, algorithm 2 of the paper.
    """

    eta: float = 0.1
    bias_correction: bool = True

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Decaying mean of Delta^2."""
        return self.beta_2 * v + (1 - self.beta_2) * square

    def rate(self, rounds: int) -> float:
        """eta, with the correction for moments that begin at zero."""
        if not self.bias_correction:
            return self.eta
        return self.eta * sqrt(1 - self.beta_2 ** (rounds + 1)) / (1 - self.beta_1 ** (rounds + 1))


def _optimised(name: str, tensor: Tensor) -> bool:
    return is_float(tensor) and not is_statistic(name)


def _held(name: str, whole: Tensor, owners: Sequence[Update]) -> Tensor:
    """Entries that some owner holds, bool."""
    held = torch.zeros_like(whole, dtype=torch.bool)
    for update in owners:
        shape = update.held.get(name, whole.shape)
        held |= padded(torch.ones(shape, dtype=torch.bool), whole.shape)
    return held
