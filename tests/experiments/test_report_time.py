"""The report's curve over simulated time, from real runs."""

import pytest
import tiny

from experiments.report import read_study, write_report
from experiments.report.curves import simulated_seconds, time_curves


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    root = tmp_path_factory.mktemp("timed")
    devices = {"classes": {"phone": {"dropout": 0.0}}}
    summary = tiny.run(root / "phones", tiny.config("fedavg", train__rounds=3, devices=devices))
    tiny.run(root / "none", tiny.config("fedavg", train__rounds=3))
    return root, summary


def test_a_run_on_devices_has_a_curve_over_simulated_seconds(timed, tmp_path):
    root, summary = timed
    study = read_study([root / "phones"])
    (run,) = study.runs
    seconds = simulated_seconds(run)
    assert list(seconds.index) == [1, 2, 3]
    assert seconds.is_monotonic_increasing
    assert seconds[3] == summary["simulated_seconds"]
    picture = time_curves(study, study.settings[0], "p")
    assert picture is not None
    assert "simulated time, seconds" in picture.svg
    assert "Accuracy against simulated time" in write_report([root / "phones"], tmp_path).html.read_text()


def test_a_run_without_devices_has_none(timed, tmp_path):
    root, _ = timed
    study = read_study([root / "none"])
    assert time_curves(study, study.settings[0], "p") is None
    assert "simulated time" not in write_report([root / "none"], tmp_path).html.read_text()
