"""The benchmark's reference loop, its arithmetic and its files, on federations of a second."""

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.bench import session
from experiments.bench.__main__ import main
from experiments.bench.bare import BareLoop, for_strangers, lay_out
from experiments.bench.contestant import ours
from experiments.bench.figures import distance, number, ratios, spread
from experiments.bench.launch import BARE, FLOWER, INPROC, PFL, RAY, launch
from experiments.bench.machine import describe
from experiments.bench.output import write
from experiments.bench.plain import TwoTowers
from experiments.bench.results import COLUMNS, Results, csv_text
from experiments.bench.stopwatch import Stopwatch, memory_bytes, processor_seconds
from experiments.bench.suites import Suite, suites, workers
from experiments.bench.tables import FIGURES, measured, method_table, paired, ratio_table, values
from experiments.bench.workloads import HEADLINE, METHODS, MLP_SMALL, SIZES, Workload
from fedmm.data import load_dataset
from fedmm.models import build_model
from server.plan import plan

TINY = Workload("tiny", "mlp", sampled=3, samples=20, registered=6)
TINY_CNN = Workload("tiny cnn", "cnn", sampled=2, samples=12, registered=3)


def parameters(workload):
    config = workload.config({"name": "inproc"}, 1)
    dataset = load_dataset(config.data)
    return sum(p.numel() for p in build_model(dataset.specs, len(dataset.classes), config.model, 0).parameters())


def record(contestant, repeat, seconds, workload="tiny", **more):
    base = {"suite": "s", "workload": workload, "contestant": contestant, "repeat": repeat, "error": ""}
    return base | {"seconds": seconds, "parameters": 10} | more


# -- the work is the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", [TINY, TINY_CNN], ids=lambda w: w.name)
def test_the_bare_loop_gives_the_weights_of_our_engine(workload):
    rounds = 2
    loop = BareLoop(lay_out(workload, rounds, "float64"))
    samples = [loop.round(1)]
    expected = loop.weights
    samples.append(loop.round(2))
    watch, training = Stopwatch(0, rounds), []
    # Stacked convolutions sum in another order than the loop's: single precision would hide what is more than that.
    weights = ours(workload.config(INPROC.engine, rounds, "float64"), watch, training).first
    assert watch.samples == samples
    assert 0 < sum(training) < sum(watch.seconds)
    assert distance(weights, expected) < 1e-12
    assert distance(weights, lay_out(workload, 1).initial) > 1e-3


def test_in_float64_a_round_agrees_to_the_last_digits_with_a_loop_written_out_here():
    setting = lay_out(TINY, 1, "float64")
    loop = BareLoop(setting)
    loop.round(1)
    total, sums = 0, None
    for client in setting.picks[0]:
        network = TwoTowers(**setting.network).double()
        with torch.no_grad():
            for p, t in zip(network.parameters(), setting.initial.values(), strict=True):
                p.copy_(t)
        speed = [torch.zeros_like(p) for p in network.parameters()]
        data = setting.clients[client]
        for order in setting.epochs(1, client):
            for rows in order.split(32):
                gradients = torch.autograd.grad(network.loss(*(t[rows] for t in data)), list(network.parameters()))
                with torch.no_grad():
                    for p, v, g in zip(network.parameters(), speed, gradients, strict=True):
                        v.mul_(0.9).add_(g)
                        p.sub_(0.05 * v)
        n = len(data[-1])
        total += n
        mine = [n * p.detach() for p in network.parameters()]
        sums = mine if sums is None else [a + b for a, b in zip(sums, mine, strict=True)]
    expected = dict(zip(setting.initial, [s / total for s in sums], strict=True))
    assert distance(loop.weights, expected) < 1e-12


def test_strangers_get_every_client_and_order():
    setting = lay_out(TINY, 2)
    arrays = for_strangers(setting)
    assert arrays["picks"].tolist() == setting.picks
    assert all(sorted(picks) == picks and len(set(picks)) == 3 for picks in setting.picks)
    place = 0
    for round, picks in enumerate(setting.picks, 1):
        for client in picks:
            for order in setting.epochs(round, client):
                size = int(arrays["sizes"][client])
                assert arrays["orders"][place : place + size].tolist() == order.tolist()
                assert sorted(order.tolist()) == list(range(size))
                place += size
    assert place == len(arrays["orders"])
    start = int(arrays["sizes"][:2].sum())
    assert torch.equal(torch.from_numpy(arrays["x1"][start : start + arrays["sizes"][2]]), setting.clients[2][1])


def test_the_models_have_the_published_numbers_of_parameters():
    assert parameters(MLP_SMALL) == 50_250
    assert parameters(next(w for w in HEADLINE if w.family == "cnn")) == 118_026
    assert [round(parameters(w) / 1e6, 1) for w in SIZES] == [0.1, 1.1, 11.3]


@pytest.mark.parametrize("workload", METHODS, ids=lambda w: w.method)
def test_methods_are_legal_configurations_without_evaluation_in_the_timed_rounds(workload):
    config = workload.config(RAY.engine, 7)
    plan(config)
    assert config.method == workload.method
    assert min(config.evaluate.every, config.checkpoint.every, config.train.rounds) == 8


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_spread_is_the_median_with_the_extremes():
    s = spread([3.0, 1.0, 10.0, 2.0, 4.0])
    assert (s.median, s.low, s.high, s.n) == (3.0, 1.0, 10.0, 5)
    assert s.text() == "3 (1-10)"
    assert spread([0.12345]).text(1e3) == "123"
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_ratios_are_taken_repeat_by_repeat():
    # The machine was twice as slow in the second repeat: that must not widen the ratio.
    assert ratios([10.0, 20.0], [5.0, 10.0]) == spread([2.0, 2.0])


def test_numbers_have_no_exponent():
    assert [number(v) for v in (0, 4e-16, 1234.5, 0.00012345, 3.14159, 99.96)] == [
        "0",
        "0",
        "1230",
        "0.000123",
        "3.14",
        "100",
    ]


def test_distance_is_relative_to_each_tensor_and_a_broken_model_is_infinitely_far():
    a = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.001])}
    assert distance(a, a) == 0
    assert distance(a | {"b": torch.tensor([0.002])}, a) == pytest.approx(1.0)
    assert distance(a | {"w": torch.tensor([3.0, float("nan")])}, a) == float("inf")
    with pytest.raises(ValueError, match="b"):
        distance({"w": a["w"]}, a)


def test_pairs_skip_repeats_in_which_one_failed():
    records = [record("a", 0, 4.0), record("b", 0, 2.0), record("a", 1, 9.0), record("b", 1, 0.0, error="broke")]
    records += [record("a", 2, 8.0), record("b", 2, 2.0)]
    assert values(records, "tiny", "b", "seconds") == [2.0, 2.0]
    found = paired(records, ("tiny", "a"), ("tiny", "b"))
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert paired(records, ("tiny", "a"), ("tiny", "c")) is None


def test_the_stopwatch_leaves_the_warm_up_out():
    watch = Stopwatch(warmup=2, rounds=2)
    assert [watch.lap(n) for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert watch.samples == [3, 4]
    assert len(watch.seconds) == 2
    assert watch.first_round_at > 0
    assert watch.memory > 0
    json.dumps(watch.result())


def test_memory_and_time_of_processes_are_read():
    import os

    assert memory_bytes(os.getpid()) > 10e6
    assert processor_seconds(os.getpid()) > 0


# -- tables and files -------------------------------------------------------------------------------------------------


def test_tables_show_medians_ratios_and_failures():
    suite = Suite("s", "Title", (TINY,), (BARE, INPROC, RAY, FLOWER))
    records = [record("inproc", i, 0.1 + i / 1000) for i in range(3)] + [record("Flower", i, 1.0) for i in range(3)]
    records += [record("ray", i, 0.0, error="broke") for i in range(3)]
    seconds = measured(suite, records, FIGURES[0])
    assert seconds.rows == (("inproc", "101 (100-102)"), ("ray", "failed"), ("Flower", "1000 (1000-1000)"))
    assert ratio_table(suite, records).rows == (("Flower / inproc", "9.9 (9.8-10)"),)
    assert "| Flower / inproc | 9.9 (9.8-10) |" in ratio_table(suite, records).markdown()


def test_methods_are_compared_with_fedavg_beside_their_size():
    suite = Suite("methods", "Methods", METHODS, (RAY,))
    names = [w.name for w in METHODS]
    records = [
        record("ray", i, seconds, name, parameters=size, processor=processor)
        for name, seconds, size, processor in zip(names, (1.0, 2.0, 3.0), (100, 150, 100), (2.0, 6.0, 4.0), strict=True)
        for i in range(2)
    ]
    table = method_table(suite, records)
    assert table.rows == (
        ("parameters", "1", "1.5", "1"),
        ("time, ray", "1 (1-1)", "2 (2-2)", "3 (3-3)"),
        ("processor time, ray", "1 (1-1)", "3 (3-3)", "2 (2-2)"),
    )


def test_files_hold_every_run(tmp_path):
    suite = Suite("s", "Title", (TINY,), (INPROC,))
    records = [record("inproc", 0, 0.1, rounds=[0.1], load=0.5, others=0.0, drift=0.0)]
    check = session.Check("tiny", "inproc", "bare loop", "float32", 1e-8, 1e-5)
    results = Results(describe(), ["now"], ["a note"], [check], records)
    write(tmp_path, results, [suite])
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert rows[0]["seconds"] == "0.1"
    assert list(rows[0]) == list(COLUMNS)
    assert rows == list(csv.DictReader(csv_text(records).splitlines()))
    assert json.loads((tmp_path / "bench.json").read_text())["runs"] == records
    text = (tmp_path / "bench.md").read_text()
    assert "a note" in text
    assert "| inproc | 100 |" in text
    assert "![s.svg](s.svg)" in text
    assert (tmp_path / "s.svg").read_text().startswith("<?xml")


def test_only_keeps_what_matches():
    (rounds, *_) = suites(quick=False)
    kept = rounds.only(["20 x 172/Flower", "20 x 172/pfl"])
    assert [(w.name, c.name) for w, c in kept.cells()] == [("mlp 20 x 172", "Flower"), ("mlp 20 x 172", "pfl")]
    assert rounds.only([]) == rounds
    assert not rounds.only(["nothing like it"]).cells()
    assert workers()[0] == 1


def test_a_check_passes_only_within_its_tolerance():
    check = session.Check("w", "c", "bare loop", "float64", 1e-13, 1e-12)
    assert check.passed
    assert not session.Check("w", "c", "bare loop", "float64", 1e-11, 1e-12).passed
    assert not session.Check("w", "c", "bare loop", "float64", 0.0, 1e-12, "did not end").passed


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("contestant", [INPROC, RAY, FLOWER], ids=lambda c: c.name)
def test_every_engine_gives_the_weights_of_the_bare_loop(contestant):
    loop = launch(BARE, TINY, warmup=0, rounds=1)
    run = launch(contestant, TINY, warmup=0, rounds=1)
    assert distance(run.weights, loop.weights) < 1e-5
    assert run.samples == loop.samples
    assert run.memory > 0
    assert run.start_up > 0


@pytest.mark.slow
def test_pfl_gives_the_weights_of_the_bare_loop():
    from experiments.bench.__main__ import PFL_VENV

    python = Path(PFL_VENV) / "bin" / "python"
    if not python.exists():
        pytest.skip("pfl is not installed")
    loop = launch(BARE, TINY, warmup=1, rounds=1)
    run = launch(PFL, TINY, warmup=1, rounds=1, pfl_python=python)
    assert distance(run.weights, loop.weights) < 1e-5
    assert run.samples == loop.samples


@pytest.mark.slow
def test_nothing_is_timed_when_somebody_computes_something_else(tmp_path, monkeypatch):
    import typer

    monkeypatch.setitem(session.TOLERANCE, "float32", -1.0)
    monkeypatch.setitem(session.TOLERANCE, "float64", -1.0)
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--quick", "--only", "inproc", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "nothing was timed" in result.output
    assert json.loads((tmp_path / "bench.json").read_text())["runs"] == []
