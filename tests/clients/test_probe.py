"""The layout probe: when clients are stacked, when not, what is on record, and that no result hangs on it."""

import json

import pytest

import clients.probe
import experiments.runner
from clients.probe import Verdict, alike, probe, read_verdict
from clients.workspace import Workspace
from experiments.runner import run
from fedmm import native
from fedmm.config.load import load_config
from fedmm.spec import client_spec

TINY = [
    "data=synthetic",
    "data.samples=300",
    "scenario.clients=8",
    "train.clients_per_round=8",
    "train.rounds=2",
    "train.local_epochs=1",
    "evaluate.probe=false",
    "model.features=8",
    "engine.cohort_size=4",
]


def config(*overrides):
    return load_config(None, [*TINY, *overrides]).config


def workspace(*overrides):
    return Workspace(client_spec(config(*overrides)), None)


@pytest.fixture
def patient(monkeypatch):
    """No step is too long: the machine may be busy."""
    monkeypatch.setattr(clients.probe, "SLOW_S", float("inf"))


@pytest.mark.usefixtures("patient")
def test_small_dense_models_are_timed_both_ways():
    here = workspace()
    before = {n: t.clone() for n, t in here.model.state_dict().items()}
    verdict = probe(here, 4)
    assert set(verdict.seconds) == {1, 4}
    assert all(0 < s < float("inf") for s in verdict.seconds.values())
    stacks_pay = verdict.seconds[4] <= 0.95 * verdict.seconds[1]
    assert verdict.cohort == (4 if stacks_pay else 1)
    assert all((before[n] == t).all() for n, t in here.model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "largest", "why"),
    [
        pytest.param(
            ["data=cgmnist", "data.samples=400", "model.width=64"],
            4,
            "128 channels are faster one by one",
            marks=pytest.mark.kernels,
        ),
        (["objective=remixing", "model.unimodal_heads=true"], 4, "does not stack"),
        ([], 1, "too few"),
    ],
)
def test_refused_without_a_measurement(overrides, largest, why):
    verdict = probe(workspace(*overrides), largest)
    assert verdict.cohort == 1
    assert why in verdict.why
    assert not verdict.seconds


@pytest.mark.kernels
@pytest.mark.usefixtures("patient")
def test_narrow_convolutions_are_timed_both_ways():
    verdict = probe(workspace("data=cgmnist", "data.samples=400"), 4)
    assert set(verdict.seconds) == {1, 4}
    faster = verdict.seconds[4] <= clients.probe.FASTER * verdict.seconds[1]
    assert verdict.cohort == (4 if faster else 1)


def test_without_kernels_convolutions_are_not_stacked(monkeypatch):
    """They round differently then, so that the choice must not hang on timing."""
    monkeypatch.setattr(native, "library", None)
    verdict = probe(workspace("data=cgmnist", "data.samples=400"), 4)
    assert verdict.cohort == 1
    assert "kernels" in verdict.why
    assert not verdict.seconds


def test_a_long_step_ends_the_probe(monkeypatch):
    monkeypatch.setattr(clients.probe, "SLOW_S", 0.0)
    verdict = probe(workspace(), 4)
    assert verdict.cohort == 1
    assert set(verdict.seconds) == {1}


@pytest.mark.usefixtures("patient")
def test_memory_is_bounded(monkeypatch):
    here = workspace()
    size = 4 * 12 * sum(p.numel() for p in here.model.parameters())
    monkeypatch.setattr(clients.probe, "MEMORY", size - 1)
    assert "would take" in probe(here, 4).why
    monkeypatch.setattr(clients.probe, "MEMORY", size)
    assert probe(here, 4).seconds


@pytest.mark.usefixtures("patient")
def test_only_clients_that_own_the_same_are_compared():
    here = workspace("scenario.modalities.multimodal=0.5")
    pool = here.pool("train")
    assert alike(pool, 8) == [k for k in range(8) if len(pool.owned[k]) == 2]
    assert set(probe(here, 4).seconds) == {1, 4}


def test_record_and_back():
    verdict = Verdict(4, 4, {1: 0.002, 4: 0.001}, "twice as fast")
    assert read_verdict(json.loads(json.dumps(verdict.record())), 4) == verdict
    assert read_verdict(verdict.record(), 8) is None
    assert read_verdict({"cohort": 4}, 4) is None


def test_no_bit_hangs_on_the_verdict(tmp_path, monkeypatch):
    found = []
    for cohort in (1, 2, 4):
        monkeypatch.setattr(experiments.runner, "choose_layout", lambda *_, c=cohort: Verdict(c, 4, {}, "forced"))
        out = tmp_path / str(cohort)
        found.append(run(config(), out)["weights_sha256"])
        assert json.loads((out / "manifest.json").read_text())["layout"]["cohort"] == cohort
    assert len(set(found)) == 1


@pytest.mark.parametrize("cohort", ["on", "off"])
def test_a_fixed_layout_is_not_probed(tmp_path, cohort):
    run(config(f"engine.cohort={cohort}"), tmp_path)
    assert "layout" not in json.loads((tmp_path / "manifest.json").read_text())


def test_a_resumed_run_keeps_its_layout(tmp_path, monkeypatch):
    first = run(config(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["layout"]["largest"] == 4
    (tmp_path / "summary.json").unlink()
    kept = manifest["layout"] | {"cohort": 1, "why": "as before"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"layout": kept}))
    assert run(config(), tmp_path, resume=True)["weights_sha256"] == first["weights_sha256"]
    assert json.loads((tmp_path / "manifest.json").read_text())["layout"] == kept
