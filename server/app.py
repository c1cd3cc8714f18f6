"""The Flower ServerApp: the same server for `flwr run`, for `fedmm run --engine flower`, and for deployment.

Run config keys (see pyproject.toml): `config` (YAML file; empty: defaults), `set` (overrides as on the command
line), `out` (absolute directory for results; empty: `runs/flower` in the working directory), `resume`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmm.config.load import load_config
from fedmm.config.schema import Config
from fedmm.io.run_directory import RunDirectory
from server.callbacks import Callback, RoundReport
from server.loop import Server
from server.plan import plan

app = ServerApp()

ROUND_MARK = "fedmm round"


class Announcer(Callback):
    """Prints a line a round, which Flower carries to its log."""

    def finished_round(self, report: RoundReport) -> None:
        """See `Callback`."""
        note = f", val accuracy {report.validation['accuracy']:.3f}" if report.validation else ""
        print(f"{ROUND_MARK} {report.round}/{report.rounds}{note}", flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config asks for on the clients that this grid has."""
    torch.set_num_threads(1)
    given: dict[str, Any] = dict(context.run_config)
    path = str(given.get("config", "")) or None
    overrides = shlex.split(str(given.get("set", "")))
    resolved = load_config(path, overrides)
    config = resolved.config
    if resolved.origin.get("scenario.clients", "default") == "default":
        config = _as_many_as_nodes(config, grid)
    directory = RunDirectory(
        Path(str(given.get("out", "")) or "runs/flower").resolve(), config, resume=bool(given.get("resume", False))
    )
    directory.finish(Server(plan(config), grid, directory, [Announcer()]).run())


def _as_many_as_nodes(config: Config, grid: Grid) -> Config:
    """A run that names no number of clients takes the nodes that are there."""
    nodes = len(list(grid.get_node_ids())) or config.scenario.clients
    train = config.train.model_copy(update={"clients_per_round": min(config.train.clients_per_round, nodes)})
    scenario = config.scenario.model_copy(update={"clients": nodes})
    return config.model_copy(update={"scenario": scenario, "train": train})
