"""ARM-style knowledge, a reconstruction (`fedmm.arm`): weak subspaces and closed heads from clients' second moments.

Each round the moments of its clients are added up and the alternation of `fedmm.arm.solver` is run on them. What is
broadcast, float32, once there are moments:

    arm.strong.m            1 for the strong modality, else 0
    arm.share.m             1 / V for each of the V weak modalities that have a subspace, else 0
    arm.span.m [d+1, d]     K_m over k_m (`fedmm.arm.span`), zero without one
    arm.weight [d, C]       W, with `head: closed`

A round whose moments tell nothing of the strong modality leaves what was known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmm.arm.moments import names_in
from fedmm.arm.solver import Solution, solve
from fedmm.arm.span import Span, spans
from fedmm.errors import ConfigError, DataError, nearest
from fedmm.models.blocks import blocks_of
from fedmm.objectives.arm import AuxiliaryRegularisation
from fedmm.objectives.base import Objective
from fedmm.types import Tensors
from server.aggregation import Update, merge_reports
from server.facts import Federates, Knowledge


class Subspace(Knowledge):
    """The last solution.

    State, empty before the first moments: slot of the strong modality (-1: none yet), int64; span.m; share.m; weight;
    head.m, W over b [d+1, C], once it is known; outside.m and unexplained.m, NaN where nobody can tell; float64.
    """

    reads = frozenset({"arm"})

    def __init__(self, federates: Federates) -> None:
        super().__init__(federates)
        self._objective = AuxiliaryRegularisation()

    def prepare(self, objective: Objective, model: Tensors) -> None:
        """Take up the objective's parameters.

        Raises:
            ConfigError: `strong` is no modality, `fused: strong` meets a joint head that does not read the modalities
                side by side, or clients would have nothing to train.
        """
        if not isinstance(objective, AuxiliaryRegularisation):
            return
        self._objective, names = objective, self.federates.modalities
        if objective.strong not in ("auto", *names):
            raise ConfigError(
                f'no modality "{objective.strong}"',
                where="objective.strong",
                remedy=nearest(objective.strong, ["auto", *names]),
            )
        if not objective.trained_blocks(blocks_of(model), names):
            raise ConfigError(
                "encoder flat, late fusion and closed heads leave clients nothing to train",
                where="model.fusion",
                remedy="use fusion: concat",
            )
        widths = [model[f"head.{m}.weight"].shape[1] for m in names]
        if objective.fused == "strong" and (
            "head.joint.weight" not in model or model["head.joint.weight"].shape[1] != sum(widths)
        ):
            raise ConfigError(
                "the joint head can read one modality alone only where it gets them side by side",
                where="objective.fused",
                remedy="use model.fusion=concat, or objective.fused=trained",
            )

    def broadcast(self) -> Tensors:
        """The tensors of the module's text."""
        if not self.tensors:
            return {}
        slot, found = int(self.tensors["slot"]), Tensors()
        for i, m in enumerate(self.federates.modalities):
            found[f"arm.strong.{m}"] = torch.tensor(float(i == slot))
            found[f"arm.share.{m}"] = self.tensors[f"share.{m}"].to(torch.float32)
            found[f"arm.span.{m}"] = self.tensors[f"span.{m}"].to(torch.float32)
        if self._objective.head == "closed":
            found["arm.weight"] = self.tensors["weight"].to(torch.float32)
        return found

    def learn(self, sent: Tensors, updates: Sequence[Update]) -> None:
        """Add the moments up and solve."""
        merged = merge_reports([u.report for u in updates])
        sums = {n.removeprefix("arm."): t for n, t in merged.items() if n.startswith("arm.")}
        if not sums:
            return
        objective, names = self._objective, names_in(sums)
        if not self.tensors:
            self.tensors = self._nothing(sums[f"cross.{names[0]}"][:-1])
        if objective.strong not in ("auto", *names):
            return
        try:
            solution = solve(sums, objective.settings(), objective.strong)
        except DataError:
            return
        self.tensors = self.tensors | self._solved(sums, solution)

    def _nothing(self, weight: Tensor) -> Tensors:
        found = {"slot": torch.tensor(-1), "weight": torch.zeros_like(weight)}
        for m in self.federates.modalities:
            found |= {f"span.{m}": weight.new_zeros(len(weight) + 1, len(weight)), f"share.{m}": weight.new_zeros(())}
            found |= {f"{name}.{m}": weight.new_full((), torch.nan) for name in ("outside", "unexplained")}
        return found

    def _solved(self, sums: Tensors, solution: Solution) -> Tensors:
        weight, held = solution.weight, spans(sums, solution)
        found = {"slot": torch.tensor(self.federates.modalities.index(solution.strong)), "weight": weight}
        found[f"head.{solution.strong}"] = torch.cat([weight, solution.bias.unsqueeze(0)])
        for m in self.federates.modalities:
            span = held.get(m, Span(weight.new_zeros(len(weight) + 1, len(weight)), torch.nan))
            values = {
                "share": 1 / len(held) if m in held else 0.0,
                "outside": span.outside,
                "unexplained": solution.unexplained.get(m, torch.nan),
            }
            found |= {f"{name}.{m}": torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
            found[f"span.{m}"] = span.map
            if m != solution.strong and (own := self._ridge(sums, m)) is not None:
                found[f"head.{m}"] = own
        # LAPACK's solutions lie column by column, what is read from messages and checkpoints row by row: products of
        # the two may round differently.
        return {n: t.contiguous() for n, t in found.items()}

    def _ridge(self, sums: Tensors, modality: str) -> Tensor | None:
        """The ridge solution of one modality alone."""
        alone = {n: sums[n] for n in (f"gram.{modality}", f"cross.{modality}") if n in sums}
        try:
            solution = solve(alone, self._objective.settings())
        except DataError:
            return None
        return torch.cat([solution.weight, solution.bias.unsqueeze(0)])

    def amend(self, model: Tensors) -> Tensors:
        """The model with the closed heads, if any."""
        if self._objective.head != "closed" or not self.tensors or int(self.tensors["slot"]) < 0:
            return model
        names, new = self.federates.modalities, dict(model)
        for m in names:
            if f"head.{m}" in self.tensors:
                new |= _layer(f"head.{m}", self.tensors[f"head.{m}"], model)
        if self._objective.fused == "strong":
            slot = int(self.tensors["slot"])
            head = self.tensors[f"head.{names[slot]}"]
            parts = [head[:-1] if i == slot else torch.zeros_like(head[:-1]) for i in range(len(names))]
            new |= _layer("head.joint", torch.cat([*parts, head[-1:]]), model)
        return new

    def metrics(self) -> dict[tuple[str, str], float]:
        """Which modality is strong, how much each leaves unexplained, and what of its predictions lies outside."""
        found = {}
        for i, m in enumerate(self.federates.modalities if self.tensors else ()):
            found[m, "arm_strong"] = float(i == int(self.tensors["slot"]))
            for name in ("outside", "unexplained"):
                value = self.tensors[f"{name}.{m}"]
                if bool(value.isfinite()):
                    found[m, f"arm_{name}"] = float(value)
        return found


def _layer(name: str, head: Tensor, model: Tensors) -> Tensors:
    """W over b as the tensors of a linear layer, in the format of the model's."""
    weight, bias = (model[f"{name}.{part}"] for part in ("weight", "bias"))
    return {f"{name}.weight": head[:-1].T.contiguous().to(weight), f"{name}.bias": head[-1].clone().to(bias)}
