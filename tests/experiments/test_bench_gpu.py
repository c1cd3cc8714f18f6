"""The benchmark of GPUs, on a processor: everything but CUDA's own calls."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from clients.cohort import Member, train_stack
from experiments.bench import gpu
from experiments.bench.figures import distance
from experiments.bench.gpu_step import StackStep, compiled, graphed

CPU = torch.device("cpu")
DENSE, SMALL, PAIR = (replace(c, samples=8, counts=(2, 3), alone=2) for c in gpu.CASES)


def test_a_stack_of_clients_is_measured_against_clients_alone():
    case = gpu.Case("dense", gpu.CASES[0].model, gpu.CASES[0].shapes, 40, (2, 3), 2)
    records = gpu.measure(case, torch.device("cpu"), repeats=1)
    assert [r["clients"] for r in records] == [2, 3]
    assert len(records[0]["stacked"]) == len(records[0]["alone"]) == 1
    assert "alone" not in records[1]
    assert records[0]["distance"] < 1e-12
    assert len(gpu.table(case, records, 10**9).rows) == 2


def test_the_room_on_a_card_follows_from_the_growth_of_memory():
    records = [{"clients": k, "memory": 100 + 10 * k, "error": ""} for k in (10, 20)]
    assert gpu.room(records, 1100) == 100
    assert gpu.room(records[:1], 1100) is None


def test_a_step_moves_weights_as_training_does():
    bench = gpu.Bench(DENSE, CPU, 3)
    step = StackStep(bench.stack, bench.received, gpu.OBJECTIVE, bench.pool, 3, gpu.SCHEDULE)
    step()
    step()  # eight samples are one batch: an epoch is a step, whatever the order
    mine = {n: bench.stack.plain(n, t.clone()) for n, t in step.weights.items()}
    trained = train_stack(
        bench.stack,
        bench.received,
        gpu.OBJECTIVE,
        bench.pool,
        [Member(k, gpu.SCHEDULE) for k in range(3)],
        list(bench.pool.x),
        {"round": torch.zeros((), dtype=torch.int64)},
        0,
        1,
    )
    assert distance(mine, {n: bench.stack.plain(n, t) for n, t in trained.model.items()}) < 1e-5
    assert distance({n: t[0] for n, t in mine.items()}, bench.received) > 1e-4


def test_a_compiled_step_is_the_same_step():
    benches = [gpu.Bench(DENSE, CPU, 2) for _ in range(2)]
    plain, other = (StackStep(b.stack, b.received, gpu.OBJECTIVE, b.pool, 2, gpu.SCHEDULE) for b in benches)
    plain()
    compiled(other, backend="eager")
    assert distance(other.weights, plain.weights) < 1e-6
    with pytest.raises(RuntimeError, match="GPU"):
        graphed(plain)


def test_nothing_of_a_stack_stays_behind_when_it_is_done():
    bench = gpu.Bench(DENSE, CPU, 3)
    bench.stacked(3)
    for name, (module, attribute) in bench.stack._slots.items():
        assert module._parameters[attribute].untyped_storage().nbytes() == bench.received[name].nbytes


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler")

    measure = gpu.measure
    monkeypatch.setattr(gpu, "FORMS", {"as it is": lambda step: step, "compiled": broken})
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "measure", lambda case, *rest: (broken if case is SMALL else measure)(case, *rest))
    assert gpu.main(tmp_path, Console(quiet=True), (SMALL, DENSE), 1, CPU) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failures"] == ["convolutional: no compiler"]
    assert [r["clients"] for r in found["runs"]] == [2, 3]
    assert [(s["form"], bool(s["error"])) for s in found["steps"]] == [("as it is", False), ("compiled", True)]
    page = (tmp_path / "gpu.md").read_text()
    assert "* convolutional: no compiler" in page
    assert "RuntimeError: no compiler" in page


def test_a_card_that_is_full_ends_the_growth(monkeypatch):
    def full(self, clients):
        if clients > 2:
            raise torch.OutOfMemoryError("full")
        return whole(self, clients)

    whole = gpu.Bench.stacked
    monkeypatch.setattr(gpu.Bench, "stacked", full)
    records = gpu.measure(replace(DENSE, counts=(2, 3, 4)), CPU, 1)
    assert [(r["clients"], r["error"]) for r in records] == [(2, ""), (3, "out of memory")]


def test_goals_of_a_card():
    def run(case, clients, stacked, alone=None):
        times = {"stacked": [stacked]} | ({"alone": [alone]} if alone else {})
        return {"case": case, "clients": clients, "error": "", **times}

    runs = [run(gpu.DENSE, 10, 1.0), run(gpu.DENSE, 100, 1.0, 30.0), run(gpu.DENSE, 200, 1.6)]
    runs += [run(gpu.PAIR, 1, 1.0, 1.0), run(gpu.PAIR, 2, 1.05, 1.0)]
    rows = {row[0]: row[1:] for row in gpu.goal_table(runs).rows}
    assert rows["100 dense clients: one by one / stacked"] == ("30", ">= 20", "met")
    assert rows["100 small CNNs: one by one / stacked"][0] == "not measured"
    assert rows["ResNet-18 pairs: stacked / one by one, worst"] == ("1.05", "<= 1.1", "met")
    assert rows["200 dense clients / 10, stacked"] == ("1.6", "<= 1.5", "missed")


@pytest.mark.slow
def test_every_kind_of_model_on_a_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FORMS", {"as it is": lambda step: step})
    monkeypatch.setattr(gpu, "STEPS", 1)
    assert gpu.main(tmp_path, Console(quiet=True), (DENSE, SMALL, PAIR), 1, CPU) == 0
