"""Local training of clients that own and train the same modalities: as a stack, or a single one by the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clients.cohort import Member, Meter, train_stack
from clients.outcome import Outcome
from clients.terms import cast
from clients.trainer import train
from clients.workspace import Workspace
from fedmm.metrics.local import STATISTICS, before_training
from fedmm.models.blocks import blocks_of
from fedmm.models.stacked import Stack
from fedmm.objectives import Objective
from fedmm.objectives.watched import METHOD, watched
from fedmm.types import Tensors


def train_together(
    here: Workspace,
    received: Tensors,
    broadcast: Tensors,
    members: Sequence[Member],
    modalities: Sequence[str],
    round: int,
    requests: Sequence[str],
    meter: Meter | None = None,
    cohort: int = 1,
    company: Sequence[Member] = (),
) -> Outcome:
    """Train clients that own and train the same modalities, in stacks of `cohort`; several only if there is a stack.

    In the bootstrap (round 0) prototypes and confidences describe the model as received, as there is no trained
    model yet; afterwards they describe the client's own, trained model (CMSFed) except for the confidence, which
    always judges the received one (FedCMI). A workspace in bfloat16 gives its results in the format of `received`.
    What is the clients' own in the broadcast ("client.") has a row a member. `company` is the whole stack, if the
    members are only a part of it (`clients.cohort.train_stack`).
    """
    stack = here.stack_for(cohort)
    objective = watched(here.objective) if METHOD in requests else here.objective
    requests = [r for r in requests if r != METHOD]
    if here.dtype == torch.bfloat16:
        low = cast(received, here.dtype), cast(broadcast, here.dtype)
        found = _train_members(here, stack, objective, *low, members, modalities, round, requests, meter, company)
        model = {n: t.to(received[n].dtype) for n, t in found.model.items()}
        return replace(found, model=model, report=cast(found.report, torch.float64))
    return _train_members(
        here, stack, objective, received, broadcast, members, modalities, round, requests, meter, company
    )


def _train_members(
    here: Workspace,
    stack: Stack | None,
    objective: Objective,
    received: Tensors,
    broadcast: Tensors,
    members: Sequence[Member],
    modalities: Sequence[str],
    round: int,
    requests: Sequence[str],
    meter: Meter | None,
    company: Sequence[Member],
) -> Outcome:
    if stack is not None:
        result = train_stack(
            stack,
            received,
            objective,
            here.pool("train"),
            members,
            modalities,
            broadcast,
            here.config.seed,
            round,
            requests,
            meter,
            company,
        )
        model = {n: stack.plain(n, t) for n, t in result.model.items()}
        sends = objective.sent_blocks(objective.optional_blocks(blocks_of(model), modalities), result.report)
        return Outcome(model, result.report, result.loss, result.steps, sends)
    (member,) = members
    return _train_alone(here, objective, received, broadcast, member, modalities, round, requests, meter or Meter())


def _train_alone(
    here: Workspace,
    objective: Objective,
    received: Tensors,
    broadcast: Tensors,
    member: Member,
    modalities: Sequence[str],
    round: int,
    requests: Sequence[str],
    meter: Meter,
) -> Outcome:
    model, data = here.load(received), here.data(member.client, "train")
    broadcast = {n: t[0] if n.startswith("client.") else t for n, t in broadcast.items()}
    report: Tensors = {}
    early = before_training(requests, round)
    for name in early:
        report |= STATISTICS[name](model, data)
    with meter.running():
        result = train(
            model,
            objective,
            data,
            modalities,
            broadcast,
            member.schedule,
            here.config.seed,
            round,
            member.client,
        )
    for name in requests:
        if name not in early:
            report |= STATISTICS[name](model, data)
    report |= result.report
    return Outcome(
        {n: t.unsqueeze(0) for n, t in result.model.items()},
        {n: t.unsqueeze(0) for n, t in report.items()},
        torch.tensor([result.loss], dtype=torch.float64),
        torch.tensor([result.steps]),
    )
