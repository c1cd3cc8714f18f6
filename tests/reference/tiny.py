"""Small models, client data and runs, so that a test costs milliseconds."""

import json
from pathlib import Path

import numpy as np
import torch

from experiments.runner import CLIENT_APP, CREW
from fedmm.config.load import load_config
from fedmm.config.schema import ModelConfig, ProjectorConfig
from fedmm.engines.inprocess import InProcessGrid
from fedmm.io.run_directory import RunDirectory
from fedmm.models import build_model
from fedmm.types import ClientData, ModalitySpec
from server.callbacks import Callback
from server.loop import Server
from server.plan import plan

CLASSES, DIMS, FEATURES = 4, 5, 6


def names(count):
    return tuple(f"m{i + 1}" for i in range(count))


def model(modalities, seed=0, depth=2, heads=True, double=True, fusion="concat", fill="infiltration", norm="none"):
    """A random model with every bias moved off zero; depth None = no projectors."""
    config = ModelConfig(
        norm=norm,
        features=FEATURES,
        width=7,
        fusion=fusion,
        projector=None if depth is None else ProjectorConfig(depth=depth, hidden=5, fill=fill),
        unimodal_heads=heads,
    )
    built = build_model({m: ModalitySpec("vector", (DIMS,)) for m in modalities}, CLASSES, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return built.double() if double else built


def data(modalities, samples=12, seed=0, missing=0.0, double=True, classes=CLASSES, fill=float("nan")):
    """Random samples; absent rows hold `fill`, and no sample lacks everything."""
    rng = np.random.default_rng(seed)
    present = rng.random((samples, len(modalities))) >= missing
    for i in np.flatnonzero(~present.any(1)):
        present[i, rng.integers(len(modalities))] = True
    x, here = {}, {}
    for j, m in enumerate(modalities):
        values = rng.normal(size=(samples, DIMS))
        values[~present[:, j]] = fill
        x[m] = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
        here[m] = torch.tensor(present[:, j])
    return ClientData(x, here, torch.tensor(rng.integers(0, classes, samples)), CLASSES)


def gradients(loss, parameters):
    """Gradient of every named tensor, zero where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def leaves(tensors):
    """Copies that gradients can be taken of."""
    return {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}


def assert_close(ours, reference, tolerance=1e-6):
    assert set(ours) == set(reference)
    for name in reference:
        gap = float((ours[name].detach() - reference[name].detach()).abs().max())
        assert gap <= tolerance, f"{name} differs by {gap:.3g}"


BASE = {
    "data.name": "synthetic",
    "data.params.samples": 280,
    "data.params.classes": CLASSES,
    "scenario.clients": 6,
    "train.clients_per_round": 3,
    "train.rounds": 2,
    "train.local_epochs": 1,
    "train.batch_size": 16,
    "train.lr": 0.05,
    "model.features": 8,
    "model.width": 16,
    "evaluate.probe": False,
}


def config(method="fedavg", **settings):
    """Configuration of a tiny run; `a__b=1` sets a.b."""
    values = BASE | {"method": method} | {k.replace("__", "."): v for k, v in settings.items()}
    text = {k: json.dumps(v).replace("Infinity", ".inf") for k, v in values.items()}
    return load_config(None, [f"{k}={v}" for k, v in text.items()]).config


def run(path, settings, *, grid=None, callbacks=(), resume=False):
    """A whole run through the real loop in this process: summary of the run directory at `path`."""
    directory = RunDirectory(Path(path), settings, resume=resume)
    grid = grid or InProcessGrid(CLIENT_APP, settings.scenario.clients, crew=CREW)
    summary = Server(plan(settings), grid, directory, callbacks).run()
    directory.finish(summary)
    return summary


def server(path, settings, grid=None):
    """The server of a tiny run, not yet started."""
    grid = grid or InProcessGrid(CLIENT_APP, settings.scenario.clients, crew=CREW)
    return Server(plan(settings), grid, RunDirectory(Path(path), settings))


def manifest(path):
    return json.loads((Path(path) / "manifest.json").read_text())


def rows(path):
    return [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]


def selected(path):
    """Round -> client -> modalities that it trained."""
    found = {}
    for row in rows(path):
        if row["metric"] == "selected":
            found.setdefault(row["round"], {}).setdefault(row["client"], []).append(row["modality"])
    return found


class StopAfter(Callback):
    """The user's Ctrl-C, right after a round."""

    def __init__(self, last):
        self.last = last

    def finished_round(self, report):
        if report.round == self.last:
            raise KeyboardInterrupt
