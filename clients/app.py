"""The Flower ClientApp: five messages, each answered as a function of the message and the client's data alone.

    query            who are you: owned modalities, sample and class counts
    query.statistics sums and counts on one split with the sent model (prototypes, confidence, moments)
    query.observe    sums for the figures of modality imbalance (`fedmm.metrics.imbalance`)
    train            local training with the run's objective
    evaluate         confusion counts of the sent model on one split

The same app serves in process, on Ray workers, in Flower's simulation and on devices.
"""

from __future__ import annotations

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.cohort import Member
from clients.faults import data_root, faults_mod
from clients.terms import fitted, local_schedule, workspace_on
from clients.together import train_together
from clients.workspace import Workspace, workspace
from fedmm.metrics.imbalance import observe
from fedmm.metrics.local import STATISTICS, evaluate
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, from_record, read_task, reply_content

app = ClientApp()


def _open(message: Message, context: Context) -> tuple[Task, Workspace]:
    # One thread: many clients share the machine, and sums must not depend on how many cores it has.
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    task = read_task(message)
    return task, workspace(task.spec, data_root(context))


def _broadcast(message: Message, task: Task, here: Workspace) -> Tensors:
    record = message.content.array_records.get("broadcast")
    knowledge = from_record(record) if record is not None else {}
    if (own := message.content.array_records.get("own")) is not None:
        knowledge |= {n: t.unsqueeze(0) for n, t in from_record(own).items()}
    knowledge["round"] = torch.tensor(max(task.round - 1, 0))
    return {n: t.to(here.device) for n, t in knowledge.items()}


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Introduce this client."""
    client = int(context.node_config["partition-id"])
    task, here = _open(message, context)
    data = here.data(client, "train")
    counts = {
        split: torch.bincount(here.data(client, split).y, minlength=data.classes).tolist()
        for split in ("train", "val", "test")
    }
    header = ReplyHeader(task.round, client, len(data), modalities=data.modalities, info={"class_counts": counts})
    return Message(reply_content(header, {}), reply_to=message)


@app.query("statistics")
def statistics(message: Message, context: Context) -> Message:
    """Sums and counts of the sent model on one split."""
    task, here = _open(message, context)
    model = here.load(here.decode(message.content.array_records["model"]))
    data = here.data(task.client, task.split)
    report: Tensors = {}
    for name in task.requests:
        report |= STATISTICS[name](model, data)
    header = ReplyHeader(task.round, task.client, len(data), modalities=data.modalities)
    return Message(reply_content(header, report), reply_to=message)


@app.query("observe")
def look(message: Message, context: Context) -> Message:
    """What the observatory wants to know of the sent model on one split."""
    task, here = _open(message, context)
    model = here.load(here.decode(message.content.array_records["model"]))
    data = here.data(task.client, task.split)
    report = observe(model, data, task.requests, _broadcast(message, task, here)) if len(data) else {}
    header = ReplyHeader(task.round, task.client, len(data), modalities=data.modalities)
    return Message(reply_content(header, report), reply_to=message)


@app.train(mods=[faults_mod])
def train(message: Message, context: Context) -> Message:
    """Train locally and return the trained blocks with the statistics that the server asked for."""
    task, here = _open(message, context)
    terms = task.terms
    schedule = local_schedule(here.config.train, task.epochs, task.lr, terms)
    own, broadcast = workspace_on(terms, task.spec, data_root(context)), _broadcast(message, task, here)
    together = train_together(
        own,
        here.decode(message.content.array_records["model"]),
        broadcast if terms.width is None else fitted(broadcast, own),
        [Member(task.client, schedule)],
        task.modalities,
        task.round if terms.stream is None else terms.stream,
        task.requests,
    )
    ((_, outcome),) = together.parts()
    header = ReplyHeader(
        task.round,
        task.client,
        len(here.data(task.client, "train")),
        loss=float(outcome.loss[0]),
        steps=int(outcome.steps[0]),
        modalities=task.modalities,
    )
    report = {n: t[0] for n, t in outcome.report.items()}
    return Message(reply_content(header, report, {n: t[0] for n, t in outcome.model.items()}), reply_to=message)


@app.evaluate()
def judge(message: Message, context: Context) -> Message:
    """Measure the sent model on the client's validation or test split."""
    task, here = _open(message, context)
    model = here.load(here.decode(message.content.array_records["model"]))
    data = here.data(task.client, task.split)
    report = evaluate(model, data, _broadcast(message, task, here)) if len(data) else {}
    header = ReplyHeader(task.round, task.client, len(data), modalities=data.modalities)
    return Message(reply_content(header, report), reply_to=message)
