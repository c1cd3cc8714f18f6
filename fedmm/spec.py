"""The client's part of a configuration, as text: the server sends it with every task, and clients key on it."""

from __future__ import annotations

import json
from typing import Any

from fedmm.config.schema import Config

_CLIENT_KEYS = ("data", "scenario", "model", "objective", "train", "faults", "seed")


def client_spec(config: Config) -> str:
    """The keys that clients need, as canonical JSON."""
    full: dict[str, Any] = config.model_dump()
    spec = {key: full[key] for key in _CLIENT_KEYS}
    if config.engine.device != "cpu":
        spec["engine"] = {"device": config.engine.device}
    return json.dumps(spec, sort_keys=True)
