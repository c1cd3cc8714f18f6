"""What the method did to each modality, in the record of a run: on request, at no cost otherwise, and true."""

import json
from statistics import mean

import pytest
import registry
import tiny

from experiments.runner import CLIENT_APP, CREW
from fedmm.engines.inprocess import InProcessGrid
from fedmm.jobs import Train
from fedmm.objectives import OBJECTIVES

TELLING = [name for name, kind in OBJECTIVES.items() if kind.acts]
MIXED = {"scenario__modalities__multimodal": 0.5, "scenario__modalities__missing": 0.2}
WATCH = {"observe__every": 1, "observe__what": ["method"]}


class Spy(InProcessGrid):
    """Keeps the requests of training jobs."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.requests = []

    def work(self, todo, shared, *, timeout=None):
        self.requests += [job.requests for job in todo if isinstance(job, Train)]
        yield from super().work(todo, shared, timeout=timeout)


def spied(path, settings):
    grid = Spy(CLIENT_APP, settings.scenario.clients, crew=CREW)
    return tiny.run(path, settings, grid=grid), grid.requests


def seen(path, scope="global"):
    """(round, client, modality, kind) -> value of what the method did."""
    return {
        (row["round"], row["client"], row["modality"], row["metric"].removeprefix("method_")): row["value"]
        for row in tiny.rows(path)
        if row["metric"].startswith("method_") and row["scope"] == scope
    }


@pytest.mark.parametrize("name", TELLING)
def test_watching_changes_nothing_and_is_not_there_unasked(tmp_path, name):
    off, unasked = spied(tmp_path / "off", registry.config(name, **MIXED))
    on, asked = spied(tmp_path / "on", registry.config(name, **MIXED, **WATCH))
    assert on["weights_sha256"] == off["weights_sha256"]
    assert not any("method" in requests for requests in unasked)
    assert any("method" in requests for requests in asked)
    rows = {which: {json.dumps(row) for row in tiny.rows(tmp_path / which)} for which in ("on", "off")}
    assert rows["off"] < rows["on"]
    more = [json.loads(row) for row in rows["on"] - rows["off"]]
    assert all(row["metric"].startswith("method_") or row["modality"] == "observation" for row in more)
    assert {kind for *_, kind in seen(tmp_path / "on")} == OBJECTIVES[name].acts


@pytest.mark.parametrize("name", TELLING)
def test_jobs_and_messages_tell_the_same(tmp_path, name):
    settings = registry.config(name, **MIXED, **WATCH, train__rounds=1, engine__cohort="off")
    tiny.run(tmp_path / "jobs", settings)
    tiny.run(tmp_path / "messages", settings, grid=InProcessGrid(CLIENT_APP, settings.scenario.clients))
    for scope in ("global", "client"):
        assert seen(tmp_path / "jobs", scope) == seen(tmp_path / "messages", scope) != {}


@pytest.mark.parametrize(("every", "rounds"), [(1, {1, 2, 3, 4, 5}), (2, {2, 4, 5}), (9, {5})])
def test_every_few_rounds_and_in_the_last(tmp_path, every, rounds):
    tiny.run(tmp_path, registry.config("ogm", train__rounds=5, observe__every=every, observe__what=["method"]))
    assert {round for round, *_ in seen(tmp_path)} == rounds


def test_its_bytes_are_the_observatorys(tmp_path):
    tiny.run(tmp_path, registry.config("ogm", **WATCH))
    blocks = [row for row in tiny.rows(tmp_path) if (row["scope"], row["modality"]) == ("block", "observation")]
    # Three clients in each of two rounds; a sum and a count for each of two modalities, float64.
    assert [(row["metric"], row["value"]) for row in blocks] == [("bytes_up", 3 * 2 * 2 * 8)] * 2


def test_a_resumed_run_has_told_the_same(tmp_path):
    settings = registry.config("negative", **WATCH, train__rounds=4)
    tiny.run(tmp_path / "straight", settings)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "broken", settings, callbacks=[tiny.StopAfter(2)])
    tiny.run(tmp_path / "broken", settings, resume=True)
    assert tiny.rows(tmp_path / "broken") == tiny.rows(tmp_path / "straight")


# m1 tells the whole truth plainly, m2 the same under noise that can be seen through: m1 leads while both learn.
LEADING = {
    "data__params__unique": 0.0,
    "data__params__redundant": 1.0,
    "data__params__synergy": 0.0,
    "data__params__noise": 0.0,
    "data__params__samples": 560,
    "train__rounds": 4,
    "train__local_epochs": 2,
    "observe__every": 9,
    "observe__what": ["method"],
}
PLAIN, HARD = (0.05, 8), (0.49, 30)
# On data as easy as these, the check closes every head that was added.
# How much of a small data set Data Remixing assigns to whom depends on the start, and evens out.
SETTINGS = {"boosting": {"objective__check": False}, "remixing": {"train__rounds": 3}}
SEEDS = {"remixing": range(8)}


def last(path, name, strong, seed=0):
    """The strong and the weak modality's figure in the last round, and its kind."""
    spread, dims = zip(*((PLAIN, HARD) if strong == "m1" else (HARD, PLAIN)), strict=True)
    given = {"data__params__spread": list(spread), "data__params__dims": list(dims)}
    tiny.run(path, registry.config(name, seed=seed, **LEADING | given | SETTINGS.get(name, {})))
    weak = {"m1": "m2", "m2": "m1"}[strong]
    (kind,) = OBJECTIVES[name].acts
    found = {m: value for (_, _, m, _), value in seen(path).items()}
    return found[strong], found[weak], kind


@pytest.mark.parametrize("strong", ["m1", "m2"])
@pytest.mark.parametrize("name", ["infiltration", "negative", "remixing", "pmr", "prototypes", "boosting"])
def test_the_weak_modality_gets_the_help(tmp_path, name, strong):
    found = [last(tmp_path / str(seed), name, strong, seed) for seed in SEEDS.get(name, [0])]
    assert {kind for *_, kind in found} < {"guided", "assigned", "enhanced", "heads"}
    assert mean(weak - strong for strong, weak, _ in found) > 0.1


@pytest.mark.parametrize("strong", ["m1", "m2"])
def test_the_leading_modality_is_slowed(tmp_path, strong):
    of_strong, of_weak, _ = last(tmp_path, "ogm", strong)
    assert of_strong < of_weak - 0.1
    assert of_weak > 0.9
