"""Bad, late, doubled and stray replies through the real loop: refused, recorded, repaired or left out by policy."""

from dataclasses import replace

import pytest
import tiny
import torch
from flwr.app import Message

from experiments.runner import CLIENT_APP
from experiments.runner import run as run_recorded
from fedmm.config.schema import FaultConfig
from fedmm.engines.inprocess import InProcessGrid
from fedmm.errors import RunError
from fedmm.io.files import weights_sha256
from fedmm.io.run_directory import RunDirectory
from fedmm.wire import read_reply, reply_content
from server.aggregation import blockwise_mean
from server.loop import Server
from server.plan import plan

KINDS = {
    "nan": "finite",
    "shape": "shape",
    "dtype": "dtype",
    "zero_samples": "samples",
    "missing_block": "blocks",
    "stale": "stale",
    "duplicate": "identity",
    "raise": "error",
}
EVERYONE = {"train__clients_per_round": 6}


def events(path, kind):
    return [e for e in tiny.manifest(path)["events"] if e["kind"] == kind]


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Hashes without any fault, by method."""
    return {
        m: tiny.run(tmp_path_factory.mktemp(m) / "run", tiny.config(m))["weights_sha256"] for m in ("fedavg", "cmsfed")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_is_repaired_by_asking_again(tmp_path, clean, kind):
    summary = tiny.run(tmp_path, tiny.config("fedavg", faults=[{"kind": kind, "attempts": 1}]))
    assert summary["weights_sha256"] == clean["fedavg"]
    assert summary["replies_used"] == summary["replies_expected"] == 6
    assert summary["status"] == "completed"
    refused = events(tmp_path, KINDS[kind])
    asked = sorted((r, k) for r, of in tiny.selected(tmp_path).items() for k in of)
    assert sorted((e["round"], e["client"]) for e in refused) == asked
    assert {e["decision"] for e in refused} == {"asked again (1 of 1)"}
    assert len(refused) == summary["events"]


def test_a_fault_in_the_bootstrap_is_repaired_too(tmp_path, clean):
    faults = [{"kind": "nan", "rounds": [0]}, {"kind": "raise", "rounds": [2], "clients": [0, 1, 2]}]
    summary = tiny.run(tmp_path, tiny.config("cmsfed", faults=faults))
    assert summary["weights_sha256"] == clean["cmsfed"]
    assert {e["client"] for e in events(tmp_path, "finite") if e["round"] == 0} == set(range(6))


@pytest.fixture(scope="module")
def without_client_two(tmp_path_factory):
    """The model that the other five clients make of one round, by hand."""
    settings = tiny.config("fedavg", train__rounds=1, **EVERYONE)
    grid = InProcessGrid(CLIENT_APP, settings.scenario.clients)  # messages: every update keeps its model
    server = tiny.server(tmp_path_factory.mktemp("five") / "run", settings, grid)
    server._connect()
    updates = server._collect(server._select(1), 1, 1)
    return weights_sha256(blockwise_mean(server.model, [u for u in updates if u.client != 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lasting_fault_never_reaches_the_model(tmp_path, without_client_two, kind):
    settings = tiny.config(
        "fedavg",
        faults=[{"kind": kind, "clients": [2], "attempts": 99}],
        policy__on_short="accept",
        policy__retries=2,
        train__rounds=1,
        **EVERYONE,
    )
    summary = tiny.run(tmp_path, settings)
    assert summary["weights_sha256"] == without_client_two
    assert (summary["replies_used"], summary["replies_expected"], summary["status"]) == (5, 6, "degraded")
    assert [e["decision"] for e in events(tmp_path, KINDS[kind])] == [
        "asked again (1 of 2)",
        "asked again (2 of 2)",
        "left out of the round",
    ]
    (short,) = events(tmp_path, "short")
    assert short["decision"] == "accepted what came"
    assert set(tiny.selected(tmp_path)[1]) == {0, 1, 3, 4, 5}


def test_every_kind_of_fault_is_drilled():
    assert {*KINDS, "kill"} == set(FaultConfig.model_json_schema()["properties"]["kind"]["enum"])


def test_a_short_round_is_skipped(tmp_path):
    settings = tiny.config(
        "fedavg", faults=[{"kind": "nan", "rounds": [2], "attempts": 99}], policy__on_short="skip", train__rounds=2
    )
    summary = tiny.run(tmp_path / "a", settings)
    one = tiny.run(tmp_path / "b", tiny.config("fedavg", train__rounds=1))
    assert summary["weights_sha256"] == one["weights_sha256"]
    assert (summary["replies_used"], summary["replies_expected"]) == (3, 6)
    assert [e["decision"] for e in events(tmp_path / "a", "short")] == ["kept the old model"]


def test_a_short_round_ends_the_run_on_record_and_resumes_when_the_client_is_cured(tmp_path, clean):
    sick = tiny.config("fedavg", faults=[{"kind": "shape", "rounds": [2], "attempts": 99}])
    with pytest.raises(RunError) as caught:
        run_recorded(sick, tmp_path)
    assert caught.value.exit_code == 4
    assert "round 2" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert [e["decision"] for e in events(tmp_path, "short")] == ["ended the run"]
    assert {e["decision"] for e in events(tmp_path, "shape")} == {"asked again (1 of 1)", "left out of the round"}
    cured = run_recorded(tiny.config("fedavg"), tmp_path, resume=True)
    assert cured["weights_sha256"] == clean["fedavg"]
    assert cured["replies_used"] == cured["replies_expected"] == 6


def test_too_few_replies_under_min_replies(tmp_path):
    enough = {"policy__min_replies": 0.8, "train__rounds": 1, **EVERYONE}
    one = tiny.config("fedavg", faults=[{"kind": "nan", "clients": [0], "attempts": 99}], **enough)
    assert tiny.run(tmp_path / "a", one)["replies_used"] == 5
    two = tiny.config("fedavg", faults=[{"kind": "nan", "clients": [0, 1], "attempts": 99}], **enough)
    with pytest.raises(RunError, match="4 of 6 asked clients contributed, at least 5 must"):
        tiny.run(tmp_path / "b", two)


@pytest.mark.parametrize(("on_short", "absent"), [("skip", [1, 4]), ("accept", [1, 4]), ("skip", None)])
def test_a_bootstrap_that_falls_short_teaches_what_came(tmp_path, on_short, absent):
    faults = [{"kind": "raise", "rounds": [0], "clients": absent, "attempts": 99}]
    summary = tiny.run(tmp_path, tiny.config("cmsfed", faults=faults, policy__on_short=on_short))
    assert summary["replies_used"] == summary["replies_expected"] == 6
    (short,) = events(tmp_path, "short")
    assert short["round"] == 0


def test_a_bootstrap_that_falls_short_ends_a_strict_run(tmp_path):
    with pytest.raises(RunError, match="round 0"):
        tiny.run(tmp_path, tiny.config("cmsfed", faults=[{"kind": "raise", "rounds": [0], "attempts": 99}]))


def test_quarantine_leaves_a_client_out_for_a_while(tmp_path):
    settings = tiny.config(
        "fedavg",
        faults=[{"kind": "nan", "clients": [3], "rounds": [1, 2], "attempts": 99}],
        policy__on_short="accept",
        policy__retries=0,
        policy__quarantine_after=2,
        policy__quarantine_rounds=2,
        train__rounds=5,
        **EVERYONE,
    )
    tiny.run(tmp_path, settings)
    present = [3 in of for _, of in sorted(tiny.selected(tmp_path).items())]
    assert present == [False, False, False, False, True]
    (event,) = events(tmp_path, "quarantine")
    assert (event["round"], event["client"]) == (2, 3)
    short = [e["round"] for e in events(tmp_path, "short")]
    assert short == [1, 2]  # a client in quarantine is not asked, so later rounds are complete


@pytest.mark.parametrize("method", ["fedavg", "cmsfed", "power-of-choice"])
def test_rounds_in_which_everyone_is_in_quarantine_are_skipped(tmp_path, method):
    settings = tiny.config(
        method,
        faults=[{"kind": "nan", "rounds": [1], "attempts": 99}],
        policy__on_short="skip",
        policy__quarantine_after=1,
        policy__quarantine_rounds=1,
        train__rounds=3,
        train__clients_per_round=6,
    )
    summary = tiny.run(tmp_path, settings)
    assert set(tiny.selected(tmp_path)) == {3}
    assert [e["round"] for e in events(tmp_path, "short")] == [1, 2]
    assert (summary["replies_used"], summary["replies_expected"]) == (6, 12)


def test_a_good_reply_ends_a_row_of_refusals(tmp_path):
    settings = tiny.config(
        "fedavg",
        faults=[{"kind": "nan", "clients": [3], "rounds": [1, 3], "attempts": 99}],
        policy__on_short="accept",
        policy__retries=0,
        policy__quarantine_after=2,
        train__rounds=4,
        **EVERYONE,
    )
    tiny.run(tmp_path, settings)
    assert events(tmp_path, "quarantine") == []
    assert [3 in of for _, of in sorted(tiny.selected(tmp_path).items())] == [False, True, False, True]


def test_an_update_that_is_too_far_away_is_refused(tmp_path):
    settings = tiny.config("fedavg", policy__max_update_norm=1e-6, policy__on_short="skip", train__rounds=1)
    summary = tiny.run(tmp_path, settings)
    assert summary["replies_used"] == 0
    assert len(events(tmp_path, "norm")) == 6
    assert summary["weights_sha256"] == weights_sha256(plan(settings).model.state_dict())


def test_a_block_moves_only_with_enough_owners(tmp_path):
    settings = tiny.config(
        "fedavg",
        scenario__modalities__multimodal=0.0,
        policy__min_owners=4,
        train__rounds=1,
        **EVERYONE,
    )
    server = tiny.server(tmp_path, settings)
    before = {n: t.clone() for n, t in server.model.items()}
    server.run()
    for name, tensor in server.model.items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


class Meddling(InProcessGrid):
    """A network that does to replies of one kind what `meddle(message, reply)` says: a list of what arrives."""

    def __init__(self, clients, meddle, kind="train"):
        super().__init__(CLIENT_APP, clients)
        self.meddle, self.kind = meddle, kind

    def stream(self, messages, *, timeout=None):
        messages = list(messages)
        sent = {}
        for reply in super().stream(messages, timeout=timeout):
            sent = sent or {m.metadata.message_id: m for m in messages}
            message = sent[reply.metadata.reply_to_message_id]
            yield from [reply] if message.metadata.message_type != self.kind else self.meddle(message, reply)


def spoilt(message, reply):
    header, report, model = read_reply(reply)
    return Message(
        reply_content(header, report, {n: torch.full_like(t, torch.nan) for n, t in model.items()}), reply_to=message
    )


def run_on(path, grid, **settings):
    config = tiny.config("fedavg", **settings)
    server = Server(plan(config), grid, RunDirectory(path, config))
    return server.run()


def test_a_second_reply_to_the_same_message_is_dropped(tmp_path, clean):
    summary = run_on(tmp_path, Meddling(6, lambda message, reply: [reply, reply, spoilt(message, reply)]))
    assert summary["weights_sha256"] == clean["fedavg"]
    assert summary["replies_used"] == 6
    assert summary["bytes_up"] == tiny.run(tmp_path / "b", tiny.config("fedavg"))["bytes_up"]


def test_order_of_arrival_changes_nothing(tmp_path, clean):
    class Reversed(InProcessGrid):
        def stream(self, messages, *, timeout=None):
            yield from reversed(list(super().stream(messages, timeout=timeout)))

    summary = run_on(tmp_path, Reversed(CLIENT_APP, 6))
    assert summary["weights_sha256"] == clean["fedavg"]


def test_a_reply_to_a_message_of_another_round_is_dropped(tmp_path, clean):
    earlier = []

    def meddle(message, reply):
        earlier.append(reply)
        return [earlier[0], reply] if len(earlier) > 3 else [reply]

    summary = run_on(tmp_path, Meddling(6, meddle))
    assert len(earlier) == 6
    assert summary["weights_sha256"] == clean["fedavg"]
    assert summary["replies_used"] == 6


def test_a_lost_reply_is_late_and_not_asked_again(tmp_path):
    summary = run_on(
        tmp_path,
        Meddling(6, lambda message, reply: [] if read_reply(reply)[0].client == 1 else [reply]),
        policy__deadline_s=60.0,
        policy__on_short="accept",
        train__rounds=1,
        **EVERYONE,
    )
    assert summary["replies_used"] == 5
    (late,) = events(tmp_path, "late")
    assert (late["client"], late["decision"]) == (1, "left out of the round")


def test_a_lying_header_cannot_pass_as_complete_training(tmp_path):
    def lie(message, reply):
        header, report, model = read_reply(reply)
        return [Message(reply_content(replace(header, modalities=("m2",)), report, model), reply_to=message)]

    config = tiny.config("divfl", train__rounds=1)
    server = Server(plan(config), Meddling(6, lie), RunDirectory(tmp_path, config))
    server._connect()
    server._bootstrap()
    assert all(float(v.norm()) > 0 for v in server.knowledge["whole_directions"].vectors("whole"))


def test_evaluation_goes_on_without_those_that_fail_and_says_so(tmp_path):
    def lose_one(message, reply):
        return [] if read_reply(reply)[0].client == 4 else [reply]

    summary = run_on(tmp_path, Meddling(6, lose_one, "evaluate"), policy__deadline_s=60.0)
    assert summary["status"] == "completed"
    missing = {(e["client"], e["decision"]) for e in events(tmp_path, "late")}
    assert missing == {(4, "not in val figures"), (4, "not in test figures")}


def test_evaluation_without_any_reply_is_an_error_of_the_run(tmp_path):
    with pytest.raises(RunError, match="no client returned evaluation figures"):
        run_on(tmp_path, Meddling(6, lambda message, reply: [], "evaluate"), policy__deadline_s=60.0)
