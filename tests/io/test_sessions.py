"""A resumed run remembers the sessions before it."""

import json

import pytest

from experiments.runner import run
from fedmm.config.load import load_config
from fedmm.errors import RunError

TINY = ["data.name=synthetic", "data.samples=300", "scenario.clients=4", "train.clients_per_round=4", "train.rounds=2"]


def test_events_of_a_failed_session_stay_on_record(tmp_path):
    broken = load_config(None, [*TINY, "faults=[{kind: nan, clients: [1], rounds: [2], attempts: 9}]"]).config
    with pytest.raises(RunError, match="round 2"):
        run(broken, tmp_path)
    healthy = broken.model_copy(update={"faults": []})
    assert run(healthy, tmp_path, resume=True)["status"] == "completed"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (before,) = manifest["earlier_sessions"]
    assert {"finite", "short"} <= {event["kind"] for event in before["events"]}
    assert manifest["events"] == []
