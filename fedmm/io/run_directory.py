"""A run's directory: config.yaml, manifest.json, metrics.jsonl / .parquet, summary.json, checkpoints/."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fedmm import native
from fedmm.config.load import dump_config, load_config
from fedmm.config.schema import Config
from fedmm.errors import ConfigError, RunError
from fedmm.io.checkpoint import Checkpoint, load_checkpoint
from fedmm.io.files import write_bytes, write_json

# What may differ between a run and its resumption: none of it changes a result.
_FREE_KEYS = ("engine", "policy", "checkpoint", "faults")
_PACKAGES = ("fedmm", "flwr", "torch", "ray", "numpy", "pandas")


class Row(NamedTuple):
    """One measurement; the tidy table's columns besides `run`.

    Attributes:
        round: From 1; 0 for the bootstrap.
        split: train, val or test.
        scope: global, client or block.
        client: Partition index for scope client.
        modality: "fused", a modality, or the block for scope block.
        metric: Name of the figure.
        value: The figure.
    """

    round: int
    split: str
    scope: str
    client: int | None
    modality: str
    metric: str
    value: float


class RunDirectory:
    """Opens a run's directory and writes its files.

    Args:
        path: The directory; made if missing.
        config: Resolved configuration.
        resume: Go on from the newest checkpoint, if there is one.
        label: How a comparison calls this run.

    Raises:
        ConfigError: The directory holds another run, or one that `resume` was not given for.
        RunError: The directory cannot be written.
        CheckpointError: The newest checkpoint is corrupt.
    """

    def __init__(
        self, path: Path, config: Config, *, resume: bool = False, label: dict[str, str] | None = None
    ) -> None:
        self.path, self.config = path, config
        check_place(path, config, resume=resume)
        self._new = not path.exists()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.checkpoint: Checkpoint | None = load_checkpoint(self.checkpoints) if resume else None
            write_bytes(path / "config.yaml", dump_config(config).encode())
            self._truncate_metrics(self.checkpoint.round if self.checkpoint else -1)
            self._manifest: dict[str, Any] = _provenance(config) | (label or {})
            self._manifest["earlier_sessions"] = self._earlier_sessions() if resume else []
            self.update_manifest({})
        except OSError as error:
            raise RunError(
                f"cannot write here: {error.strerror or error}", where=str(path), remedy="choose another --out"
            ) from None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def finished(self) -> dict[str, Any] | None:
        """The summary, if the run that lies here is complete."""
        return read_summary(self.path)

    def withdraw(self) -> bool:
        """Take back the files of a run that could not begin, so that the place is free; False: it had begun."""
        ours = {"config.yaml", "manifest.json", "checkpoints"}
        if not self._new or {entry.name for entry in self.path.iterdir()} != ours or any(self.checkpoints.iterdir()):
            return False
        shutil.rmtree(self.path)
        return True

    def append(self, rows: Iterable[Row]) -> None:
        """Append measurements to metrics.jsonl and flush."""
        with (self.path / "metrics.jsonl").open("a") as handle:
            handle.writelines(map(_line, rows))

    def update_manifest(self, values: dict[str, Any]) -> None:
        """Merge values into manifest.json; nothing is written if they are there already."""
        if values and all(name in self._manifest and self._manifest[name] == value for name, value in values.items()):
            return
        self._manifest |= values
        write_json(self.path / "manifest.json", self._manifest)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and, for a run that came to its end, metrics.parquet."""
        frame = read_metrics(self.path)
        frame.insert(0, "run", self.path.name)
        frame.to_parquet(self.path / "metrics.parquet", index=False)
        self.update_manifest({"ended": now()})
        write_json(self.path / "summary.json", summary)

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        """When this run was started before, and what went wrong then: events after the checkpoint live nowhere else."""
        try:
            old = json.loads((self.path / "manifest.json").read_text())
        except (OSError, ValueError):
            return []
        if not isinstance(old, dict):
            return []
        return [*old.get("earlier_sessions", []), {key: old.get(key) for key in ("started", "command", "events")}]

    def _truncate_metrics(self, last: int) -> None:
        """Drop what the resumed run measures again: everything after the checkpoint, and the final test."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            frame = read_metrics(self.path)
            kept = frame[(frame["round"] <= last) & (frame["split"] != "test")]
            write_bytes(path, "".join(_line(Row(*_plain(r))) for r in kept.itertuples(index=False)).encode())


def check_place(path: Path, config: Config, *, resume: bool) -> None:
    """Make sure that a directory is free, or holds this very run and `resume` was asked for; change nothing.

    Raises:
        ConfigError: It holds another run, or one that `resume` was not given for.
        RunError: It is no directory.
    """
    old = path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise RunError("is not a directory", where=str(path), remedy="choose another --out")
    if not old.exists():
        return
    before, new = load_config(old).config.model_dump(), config.model_dump()
    changed = [k for k in new if k not in _FREE_KEYS and before[k] != new[k]]
    if changed:
        raise ConfigError(
            f"holds a run with other values of {', '.join(changed)}",
            where=str(path),
            remedy="choose another --out, or delete the directory",
        )
    if not resume:
        raise ConfigError("holds this run already", where=str(path), remedy="add --resume, or choose another --out")


def read_metrics(path: Path) -> pd.DataFrame:
    """metrics.jsonl as a table; what follows a damaged line, such as a last one cut off, is left out."""
    rows = []
    file = path / "metrics.jsonl"
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            break
    frame = pd.DataFrame(rows, columns=list(Row._fields))
    return frame.astype({"round": "int64", "client": "Int64", "value": "float64"})


def read_summary(path: Path) -> dict[str, Any] | None:
    """summary.json of a run that came to its end (completed or degraded), else None."""
    try:
        summary: Any = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("status") in ("completed", "degraded") else None


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _plain(row: Any) -> tuple[Any, ...]:
    return tuple(None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in row)


def _line(row: Row) -> str:
    """A row as JSON; a round of a hundred clients has hundreds, hence no general encoder."""
    round, split, scope, client, modality, metric, value = row
    before, between = _text(split, scope, modality, metric)
    number = repr(float(value)) if value is not None and isfinite(value) else "null"
    return f'{{"round": {round}{before}{"null" if client is None else client}{between}{number}}}\n'


@lru_cache(maxsize=4096)
def _text(split: str, scope: str, modality: str, metric: str) -> tuple[str, str]:
    """What stands in a row's line between its round and its client, and between that and its value."""
    before = f', "split": {json.dumps(split)}, "scope": {json.dumps(scope)}, "client": '
    return before, f', "modality": {json.dumps(modality)}, "metric": {json.dumps(metric)}, "value": '


def _provenance(config: Config) -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "started": now(),
        "command": shlex.join([Path(sys.argv[0]).name.replace("cli.py", "fedmm"), *sys.argv[1:]]),
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | versions,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cores": os.cpu_count(),
            "kernels": native.instructions(),
        },
        "events": [],
    }
