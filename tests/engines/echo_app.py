"""A small client app whose behaviour is asked for in the message."""

import os
import signal
import time

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def _reply(message: Message, context: Context) -> Message:
    partition = int(context.node_config["partition-id"])
    state = context.state.setdefault("count", MetricRecord({"calls": 0}))
    state["calls"] += 1
    values = [array.numpy() for name in message.content.array_records for array in message.content[name].values()]
    total = torch.zeros(64, 64)
    for value in values:
        total = total + torch.from_numpy(value) @ torch.full((64, 64), 1 / (partition + 3))
    return Message(
        RecordDict(
            {
                "arrays": ArrayRecord([np.asarray(total)]),
                "metrics": MetricRecord(
                    {"partition": partition, "calls": state["calls"], "pid": os.getpid(), "nice": os.nice(0)}
                ),
            }
        ),
        reply_to=message,
    )


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply(message, context)


@app.train("slow")
def slow(message: Message, context: Context) -> Message:
    time.sleep(float(message.content["config"]["seconds"]))
    return _reply(message, context)


@app.train("fail")
def fail(message: Message, context: Context) -> Message:
    reply = _reply(message, context)
    if context.node_config["partition-id"] in message.content["config"]["partitions"]:
        raise ValueError("two\nlines")
    return reply


@app.train("die")
def die(message: Message, context: Context) -> Message:
    if context.node_config["partition-id"] in message.content["config"]["partitions"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return _reply(message, context)


@app.train("spoil")
def spoil(message: Message, context: Context) -> Message:
    reply = _reply(message, context)
    message.content["arrays"].clear()
    return reply


@app.query()
def environment(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"metrics": MetricRecord({"threads": torch.get_num_threads(), "pid": os.getpid()})}),
        reply_to=message,
    )
