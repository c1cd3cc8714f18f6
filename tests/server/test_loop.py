"""The round loop's bookkeeping: schedule, selection, bytes, splits, callbacks, reproducibility."""

import pytest
import registry
import tiny
import torch

from experiments.runner import CLIENT_APP
from fedmm.config.schema import TrainConfig
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import RunError
from fedmm.models import bytes_per_block
from server.callbacks import Callback
from server.loop import learning_rate
from server.plan import plan


def test_the_papers_learning_rate():
    train = TrainConfig(rounds=180, lr=1e-3, lr_schedule="paper", lr_hold=80, lr_min=1e-4)
    assert [learning_rate(train, t) for t in (1, 80)] == [1e-3, 1e-3]
    assert learning_rate(train, 81) == pytest.approx(5.95e-4)
    assert learning_rate(train, 180) == pytest.approx(1e-4)
    assert all(learning_rate(train, t) > learning_rate(train, t + 1) for t in range(80, 180))
    assert learning_rate(TrainConfig(lr=0.3), 1000) == 0.3


@pytest.mark.parametrize("method", ["fedavg", "fedcmi", "cmsfed"])
def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path, method):
    torch.manual_seed(1)
    one = tiny.run(tmp_path / "a", tiny.config(method))
    torch.manual_seed(2)
    two = tiny.run(tmp_path / "b", tiny.config(method))
    other = tiny.run(tmp_path / "c", tiny.config(method, seed=1))
    assert one["weights_sha256"] == two["weights_sha256"] != other["weights_sha256"]
    assert tiny.rows(tmp_path / "a") == tiny.rows(tmp_path / "b")


def test_bytes_are_those_of_the_blocks_that_travel(tmp_path):
    config = tiny.config("fedavg", train__rounds=1, evaluate__every=1)
    summary = tiny.run(tmp_path, config)
    sizes = bytes_per_block(plan(config).model.state_dict())
    up = {r["modality"]: r["value"] for r in tiny.rows(tmp_path) if r["metric"] == "bytes_up"}
    down = {r["modality"]: r["value"] for r in tiny.rows(tmp_path) if r["metric"] == "bytes_down"}
    assert {b: up[b] for b in sizes} == {b: 3 * n for b, n in sizes.items()}
    assert {b: down[b] for b in sizes} == {b: (3 + 6) * n for b, n in sizes.items()}  # to train, and to validate
    assert summary["bytes_up"] == sum(up.values())


def test_a_weak_only_pick_saves_the_other_encoder(tmp_path):
    config = tiny.config("cmsfed", selection__theta=0.0, train__rounds=1, train__clients_per_round=6)
    tiny.run(tmp_path, config)
    (picks,) = tiny.selected(tmp_path).values()
    (weak,) = {m for names in picks.values() for m in names}
    rows = [r for r in tiny.rows(tmp_path) if r["metric"] == "bytes_up" and r["round"] == 1]
    sizes = bytes_per_block(plan(config).model.state_dict())
    up = {r["modality"]: r["value"] for r in rows if r["modality"] in sizes}
    assert up == {f"encoder.{weak}": 6 * sizes[f"encoder.{weak}"], "head.joint": 6 * sizes["head.joint"]}


def test_the_best_validated_model_meets_the_test_data(tmp_path):
    config = tiny.config("fedavg", train__rounds=6, train__lr=0.3, evaluate__choose="best")
    summary = tiny.run(tmp_path, config)
    found = {r["round"]: r["value"] for r in tiny.rows(tmp_path) if (r["split"], r["metric"]) == ("val", "accuracy")}
    assert summary["chosen_round"] == max(found, key=lambda r: (found[r], -r))
    assert summary["val"]["accuracy"] == pytest.approx(max(found.values()))


def test_test_data_are_met_once_at_the_end(tmp_path):
    tiny.run(tmp_path, tiny.config("fedavg", train__rounds=3))
    assert {r["round"] for r in tiny.rows(tmp_path) if r["split"] == "test"} == {3}
    assert {r["round"] for r in tiny.rows(tmp_path) if r["split"] == "val"} == {1, 2, 3}


def test_validation_every_few_rounds_and_in_the_last(tmp_path):
    tiny.run(tmp_path, tiny.config("fedavg", train__rounds=5, evaluate__every=2))
    assert {r["round"] for r in tiny.rows(tmp_path) if r["split"] == "val"} == {2, 4, 5}


def test_callbacks_hear_of_everything(tmp_path):
    heard = []

    class Ear(Callback):
        def started(self, first_round, rounds):
            heard.append(("started", first_round, rounds))

        def replied(self, done, asked):
            heard.append(("replied", done, asked))

        def finished_round(self, report):
            heard.append(("finished", report.round))

        def ended(self, summary):
            heard.append(("ended", summary["status"]))

    tiny.run(tmp_path, tiny.config("fedavg", train__rounds=2), callbacks=[Ear()])
    assert [h for h in heard if h[0] != "replied"] == [
        ("started", 1, 2),
        ("finished", 1),
        ("finished", 2),
        ("ended", "completed"),
    ]
    assert ("replied", 3, 3) in heard


def test_more_nodes_than_clients_are_refused(tmp_path):
    from experiments.runner import CLIENT_APP
    from fedmm.engines.inprocess import InProcessGrid

    config = tiny.config("fedavg")
    with pytest.raises(RunError, match=r"scenario\.clients.*7 nodes"):
        tiny.run(tmp_path, config, grid=InProcessGrid(CLIENT_APP, 7))


@pytest.mark.parametrize("objective", ["joint", "remixing"])
def test_jobs_of_stacks_and_of_single_clients_give_what_messages_give(tmp_path, objective):
    # Data Remixing trains client by client, in one model's memory, while the sum of a leaf needs all of its clients.
    settings = registry.config(objective, train__rounds=1)
    found = []
    for name, grid in {"jobs": None, "messages": InProcessGrid(CLIENT_APP, settings.scenario.clients)}.items():
        server = tiny.server(tmp_path / name, settings, grid)
        server.run()
        found.append(server.model)
    for n, t in found[0].items():
        assert torch.allclose(t, found[1][n], rtol=1e-6, atol=1e-7)
