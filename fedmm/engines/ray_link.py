"""What joins the driver to a Ray worker on the same machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import ray
from ray import ObjectRef

from fedmm.engines.lines import Line
from fedmm.engines.memory import Memory

REASON_SECONDS = 5.0
"""How long to wait for Ray's account of a death that a line's end has told."""


@dataclass(eq=False)
class Link:
    """The driver's side.

    Attributes:
        memory: For the arrays of jobs and results.
        line: For the rest of them.
        serving: The worker's call that listens to the line, if it does; while it runs, other calls have to wait.
    """

    memory: Memory
    line: Line
    serving: ObjectRef[Any] | None = None

    def order(self, worker: Any, order: Any) -> Self:
        """Have the worker do jobs.

        Raises:
            BrokenPipeError: It is dead.
        """
        if self.serving is None:
            self.serving = worker.serve.remote()
        self.line.send(order)
        return self

    def pause(self) -> None:
        """Have the worker listen to other calls.

        Raises:
            BrokenPipeError: It is dead.
        """
        if self.serving is not None:
            self.line.send(None)
            self.serving = None

    def answer(self) -> Any:
        """The result of the last order; raises what ended the worker instead."""
        assert self.serving is not None
        try:
            return self.line.receive()
        except EOFError:
            return ray.get(self.serving, timeout=REASON_SECONDS)

    def close(self) -> None:
        """Give it up."""
        self.memory.close()
        self.line.close()
