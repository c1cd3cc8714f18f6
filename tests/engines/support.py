"""Messages to `echo_app`, what makes two replies equal, and what is left of a program."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

APP = "echo_app:app"
CLIENTS = 7


def arrays(seed=0, size=64):
    return ArrayRecord([np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)])


def messages(grid, action="train", record=None, nodes=None, **config):
    record = record or arrays()
    return [
        Message(RecordDict({"arrays": record, "config": ConfigRecord(config)}), node, action)
        for node in (nodes or grid.get_node_ids())
    ]


def by_partition(grid, replies):
    """Partition -> (numbers, number of calls) or the error's code and reason."""
    out = {}
    for reply in replies:
        partition = grid.contexts[reply.metadata.src_node_id].node_config["partition-id"]
        assert partition not in out
        if reply.has_error():
            out[partition] = (reply.error.code, reply.error.reason)
        else:
            metrics = reply.content["metrics"]
            assert metrics["partition"] == partition
            out[partition] = (reply.content["arrays"]["0"].data, metrics["calls"])
    return out


def pids(replies):
    return {reply.content["metrics"]["pid"] for reply in replies}


def variables():
    """Process id -> its environment, as it was started with, of every living process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def processes():
    """(process id, session, command) of every living process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z":
                    found.append(
                        (int(entry.name), int(session), (entry / "cmdline").read_bytes().decode(errors="replace"))
                    )
    return found
