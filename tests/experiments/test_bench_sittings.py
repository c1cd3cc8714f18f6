"""The benchmark in several sittings: what is kept, what is refused, how long it says it takes, and its goals."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

import experiments.bench.__main__ as program
from experiments.bench import launch, machine, session
from experiments.bench.duration import Forecast, minutes, rough
from experiments.bench.figures import spread
from experiments.bench.goals import GOALS, Goal, dearer, goal_table, growth, outside, ratio
from experiments.bench.launch import FLOWER, INPROC, RAY
from experiments.bench.results import Results, begin
from experiments.bench.stopwatch import FEWEST, Stopwatch
from experiments.bench.suites import Suite, suites
from experiments.bench.tables import tables
from experiments.bench.workloads import HEADLINE, LARGE, METHODS, Workload
from fedmm.errors import ConfigError, RunError

ONE, OTHER = (Workload(name, "mlp", 3, 20, registered=6) for name in ("one", "other"))
SUITE = Suite("s", "Title", (ONE, OTHER), (INPROC, RAY), repeats=2)


def fake(seconds=0.1, **more):
    base = launch.Run([seconds] * 4, [60] * 4, 3.0, 0.4, 0.0, 10**8, 10, 0.1, "2", 0.3, 4, 5.0, {"w": torch.ones(2)})
    return replace(base, **more)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command on two workloads whose runs are made up: every call is noted; `fail` makes one of them raise."""
    calls, fail = [], {}

    def run(contestant, workload, **_):
        calls.append((workload.name, contestant.name))
        if len(calls) in fail:
            raise fail[len(calls)]
        return fake()

    monkeypatch.setattr(session, "launch", run)
    monkeypatch.setattr(program, "suites", lambda quick: [SUITE])
    app = typer.Typer()
    app.command()(program.main)

    def invoke(*arguments):
        calls.clear()
        return CliRunner().invoke(app, ["--no-check", "--only", "s/", "--out", str(tmp_path), *arguments])

    return invoke, calls, fail


def runs(tmp_path):
    return [
        (r["workload"], r["contestant"], r["repeat"]) for r in json.loads((tmp_path / "bench.json").read_text())["runs"]
    ]


# -- sittings ---------------------------------------------------------------------------------------------------------


def test_what_was_measured_before_an_interruption_is_kept_and_added_to(bench, tmp_path):
    invoke, calls, fail = bench
    fail[6] = KeyboardInterrupt()
    stopped = invoke()
    assert stopped.exit_code == 130
    assert "[5/8," in stopped.output
    assert "Stopped after 4 of 8 runs" in (tmp_path / "bench.md").read_text()
    first = [("one", "inproc", 0), ("one", "ray", 0), ("other", "inproc", 0), ("other", "ray", 0)]
    assert runs(tmp_path) == first
    fail.clear()
    assert invoke("--add").exit_code == 0
    assert len(calls) == 4
    assert runs(tmp_path) == first + [(w, c, 1) for w, c, _ in first]
    page = (tmp_path / "bench.md").read_text()
    assert "Stopped" not in page
    assert page.count(" and 20") == 1  # two times of measurement
    assert invoke("--add").exit_code == 0
    assert not calls


def test_every_turn_is_on_disk_before_the_next_begins(bench, tmp_path, monkeypatch):
    invoke, _, _ = bench
    seen, measure = [], session.measure
    monkeypatch.setattr(
        session,
        "measure",
        lambda turn, *rest: (
            seen.append(len(runs(tmp_path)) if (tmp_path / "bench.json").exists() else 0),
            measure(turn, *rest),
        )[1],
    )
    invoke()
    assert seen == [0, 2, 4, 6]


def test_a_failed_run_is_measured_again(bench, tmp_path):
    invoke, calls, fail = bench
    fail[2] = RunError("broke")
    assert invoke().exit_code == 0
    fail.clear()
    assert invoke("--add").exit_code == 0
    # With its neighbour, as ratios are taken between runs next to each other.
    assert calls == [("one", "inproc"), ("one", "ray")]
    assert all(not r["error"] for r in json.loads((tmp_path / "bench.json").read_text())["runs"])


def test_measurements_of_other_code_are_not_mixed(bench, tmp_path, monkeypatch):
    invoke, calls, _ = bench
    invoke()
    before = (tmp_path / "bench.json").read_bytes()
    monkeypatch.setattr(machine, "code", lambda: "another")
    refused = invoke("--add")
    assert refused.exit_code == 2
    assert "another here" in " ".join(refused.output.split())
    assert not calls
    assert (tmp_path / "bench.json").read_bytes() == before
    (tmp_path / "bench.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be added to"):
        begin(tmp_path, add=True)


def test_the_code_digest_follows_the_engine_and_not_the_tables(tmp_path, monkeypatch):
    for place in ("fedmm", "clients", "server", "experiments/bench"):
        (tmp_path / place).mkdir(parents=True)
    for name in machine.CODE[3:]:
        (tmp_path / name).write_text("a = 1")
    (tmp_path / "server" / "loop.py").write_text("a = 1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    found = machine.code()
    (tmp_path / "experiments" / "bench" / "tables.py").write_text("a = 2")
    assert machine.code() == found
    (tmp_path / "server" / "loop.py").write_text("a = 2")
    assert machine.code() != found


def test_a_suite_without_a_run_has_no_table_and_a_workload_without_one_no_column():
    assert tables(SUITE, []) == []
    found = tables(SUITE, [record("s", "other", "ray", seconds=0.1, parameters=10)])
    assert found[0].columns == ("", "other")
    assert found[0].rows == (("ray", "100"),)


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_slow_run_ends_after_a_few_rounds():
    watch = Stopwatch(warmup=1, rounds=10, budget=0.0)
    assert [watch.lap(1) for _ in range(1 + FEWEST)] == [False] * FEWEST + [True]
    assert Stopwatch(warmup=0, rounds=1, budget=0.0).lap(1)


def test_the_forecast_learns_from_finished_runs():
    cells = {("s", "w", c): 10.0 for c in ("a", "b", "c")}
    forecast = Forecast(cells)
    assert forecast.seconds(cells) == 30
    forecast.learn([{"suite": "s", "workload": "w", "contestant": "a", "took": 20.0}])
    assert forecast.seconds(cells) == 60  # the others, too, as a turned out
    forecast.learn([{"suite": "s", "workload": "w", "contestant": "b", "took": 5.0}])
    assert forecast.seconds([("s", "w", "b")] * 2) == 10
    assert (minutes(89.6), minutes(600)) == ("90 s", "10 min")


def test_the_whole_benchmark_is_expected_to_end_within_three_quarters_of_an_hour():
    cost = {s.name: s.repeats * sum(rough(s, *cell) for cell in s.cells()) for s in suites(quick=False)}
    checks = 6.0 * session.checking_runs(suites(quick=False))
    assert cost["headline"] < 11 * 60
    assert sum(cost.values()) + checks + sum(seconds for seconds, _ in program.EXTRAS.values()) < 45 * 60


def test_flower_is_spared_a_thousand_messages_a_round():
    for suite in suites(quick=False):
        assert all(w.sampled <= 100 for w, c in suite.cells() if c == FLOWER)


# -- goals ------------------------------------------------------------------------------------------------------------


def record(suite, workload, contestant, repeat=0, **more):
    return {"suite": suite, "workload": workload, "contestant": contestant, "repeat": repeat, "error": "", **more}


def results(*records):
    return Results({}, runs=list(records))


def test_a_goal_is_met_by_the_median():
    found = results()
    at_least, at_most = (Goal("x", lambda _: spread([1.0, 3.0, 9.0]), 3.0, most=most) for most in (False, True))
    assert at_least.row(found) == ("x", "3 (1-9)", ">= 3", "met")
    assert at_most.row(found)[2:] == ("<= 3", "met")
    assert replace(at_least, bound=3.1).row(found)[-1] == "missed"
    assert replace(at_most, bound=2.9).row(found)[-1] == "missed"
    assert replace(at_least, find=lambda _: None).row(found)[1:] == ("not measured", ">= 3", "-")


def test_goals_are_read_from_their_own_suite():
    small = HEADLINE[0].name
    runs = [record(s, small, c, seconds=t) for s, c, t in (("headline", "Flower", 3.0), ("headline", "ray", 1.0))]
    found = results(*runs, record("sampled", small, "Flower", 1, seconds=90.0))
    assert ratio("headline", small, "Flower", "ray")(found).median == 3
    assert ratio("headline", small, "pfl", "ray")(found) is None
    assert outside(small)(results(record("headline", small, "inproc", training_share=0.7))).median == pytest.approx(30)


def test_processor_time_is_taken_beyond_added_parameters():
    sizes = {"fedavg": (100, 1.0), "fedcmi": (200, 3.0)}
    runs = [
        record("methods", w.name, "inproc", processor=sizes[w.method][1], parameters=sizes[w.method][0])
        for w in METHODS
        if w.method in sizes
    ]
    assert dearer("fedcmi")(results(*runs)).median == 1.5
    assert dearer("cmsfed")(results(*runs)) is None


def test_memory_grows_by_what_a_client_needs_beyond_its_samples():
    samples = 33 * (4 * (64 + 128) + 2 + 8)  # vectors in float32, a flag for each, the label
    few, many = LARGE[:2]
    more = (many.registered - few.registered) * (samples + 20_000) / 1e6
    runs = [record("large", w.name, "ray", memory_mb=m) for w, m in ((few, 500.0), (many, 500.0 + more))]
    assert growth("ray")(results(*runs)).median == pytest.approx(20)
    assert growth("inproc")(results(*runs)) is None


def test_goals_stand_on_the_page_when_something_was_measured():
    assert goal_table(results()) is None
    table = goal_table(
        Results({}, selection=[{"clients": 100_000, "method": "cmsfed", "seconds": 12.0, "memory_mb": 500}])
    )
    assert ("s, CMSFed picks 1,000 of 100,000", "12", "<= 20", "met") in table.rows
    assert len(table.rows) == len(GOALS)
