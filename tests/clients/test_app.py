"""The client app: replies are functions of the message; messages survive the wire; unreadable ones are refused."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import tiny
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from clients.app import app
from clients.trainer import LocalSchedule, batches
from fedmm.engines.inprocess import InProcessGrid
from fedmm.metrics.fields import Field
from fedmm.models import serves
from fedmm.objectives.joint import Joint
from fedmm.spec import client_spec
from fedmm.types import Tensors
from fedmm.wire import ReplyHeader, Task, from_record, read_reply, read_task, reply_content, task_record, to_record
from server.admission import Expected, Refusal, admit, parse
from server.plan import plan


@pytest.fixture(scope="module", autouse=True)
def identity():
    InProcessGrid(app, 1)  # Flower's messages need a process with an identity


def message(kind, config, task, model=None, broadcast=None):
    content = RecordDict({"task": task_record(task)})
    if model is not None:
        content["model"] = to_record(model)
    if broadcast is not None:
        content["broadcast"] = to_record(broadcast)
    sent = Message(content, 10_000 + task.client, kind)
    sent.metadata.__dict__["_message_id"] = "m"
    return sent


def ask(kind, config, task, model=None):
    context = Context(1, task.client, {"partition-id": task.client, "num-partitions": 6}, RecordDict(), {})
    sent = message(kind, config, task, model)
    return read_reply(app(message=sent, context=context))


@pytest.mark.parametrize("method", ["fedavg", "fedcmi", "cmsfed-v1"])
def test_a_reply_is_a_function_of_the_message(method):
    """Other clients in between, and other weights in the blocks that are not sent, change nothing."""
    config = tiny.config(method, scenario__modalities__multimodal=0.34)
    prepared = plan(config)
    model: Tensors = prepared.model.state_dict()
    spec = client_spec(config)
    owned = {}
    for k in range(6):
        header, _, _ = ask("query", config, Task(spec, 0, k))
        owned[k] = header.modalities

    def train(k):
        part = {n: t for n, t in model.items() if serves(n, owned[k])}
        task = Task(spec, 2, k, owned[k], ("prototypes", "moments"), lr=0.05)
        return ask("train", config, task, part)

    first = {k: train(k) for k in range(6)}
    second = {k: train(k) for k in reversed(range(6))}
    for k in range(6):
        assert first[k][0] == second[k][0]
        assert set(first[k][0].modalities) == set(owned[k])
        for one, other in zip(first[k][1:], second[k][1:], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(t, other[n]) for n, t in one.items())
        assert all(serves(n, owned[k]) for n in first[k][2])


def test_a_weak_only_task_trains_and_returns_one_modality():
    config = tiny.config("cmsfed")
    model = plan(config).model.state_dict()
    task = Task(client_spec(config), 1, 0, ("m2",), ("prototypes",), lr=0.05)
    header, report, trained = ask("train", config, task, model)
    assert header.modalities == ("m2",)
    assert {n.split(".")[1] for n in trained if n.startswith("encoder")} == {"m2"}
    assert not any(torch.equal(t, model[n]) for n, t in trained.items())
    assert "prototype_sum.m1" in report  # prototypes describe everything that the client owns


def test_epochs_are_permutations_from_their_own_stream():
    schedule = LocalSchedule(3, 4, 0.1, 0.9, 0.0)
    found: dict[int, list] = {}
    ten = tiny.data(tiny.names(2), 10)

    def drawn(*path):
        return [(epoch, batch.index) for epoch, batch in batches(Joint(), ten, {}, schedule, *path)]

    for epoch, rows in drawn(0, 1, 2):
        found.setdefault(epoch, []).append(rows)
    assert [len(r) for r in found[0]] == [4, 4, 2]
    orders = [torch.cat(parts) for parts in found.values()]
    assert all(torch.equal(o.sort().values, torch.arange(10)) for o in orders)
    assert not torch.equal(orders[0], orders[1])
    again = [r for _, r in drawn(0, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip([r for p in found.values() for r in p], again, strict=True))
    others = [torch.cat([r for _, r in drawn(*path)]) for path in ((1, 1, 2), (0, 2, 2), (0, 1, 3))]
    assert all(not torch.equal(torch.cat(orders), other) for other in others)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.tensor(2.5),
        torch.tensor(-7),
        torch.tensor([True, False]),
        torch.randn(2, 3).double(),
        torch.zeros(0, 4),
        torch.randn(4, 3).T,
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
)
def test_tensors_survive_the_wire(tensor):
    (back,) = from_record(to_record({"x": tensor})).values()
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(
        back.reshape(-1).contiguous().view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
    )
    back.add_(1) if back.dtype != torch.bool else back.logical_not_()  # fresh, writable memory


def test_tasks_and_headers_survive_the_wire():
    task = Task("spec", 3, 2, ("a", "b"), ("prototypes",), "val", 4, 0.1, 1)
    assert read_task(message("train", None, task)) == task
    header = ReplyHeader(3, 2, 10, 0.5, 7, ("a",), {"n": [1]})
    reply = Message(reply_content(header, {"hits": torch.tensor(1.0)}, {}), reply_to=message("train", None, task))
    assert read_reply(reply)[0] == header
    assert asdict(header)["samples"] == int(reply.content["metrics"]["num-examples"])


# Admission of what no honest client sends -----------------------------------------------------------------------

TASK = Task("spec", 3, 2, ("a",))
SENT = {"encoder.a.w": torch.zeros(2), "head.joint.w": torch.zeros(3)}
GOOD = ReplyHeader(3, 2, 10, modalities=("a",))


def reply(header=GOOD, report=None, model=None):
    content = reply_content(header, report or {}, SENT if model is None else model)
    return Message(content, reply_to=message("train", None, TASK))


def verdict(sent):
    found = admit(sent, TASK, Expected(SENT, {}, ("a", "b")), 10)
    return found.kind if isinstance(found, Refusal) else found


def test_a_good_reply_is_admitted():
    update = verdict(reply())
    assert (update.client, update.samples, update.modalities, update.complete) == (2, 10, ("a",), False)


REPORT = {"prototype_count.a": Field((2,)), "prototype_sum.a": Field((2, 3), signed=True)}
FULL = {
    "prototype_count.a": torch.ones(2, dtype=torch.float64),
    "prototype_sum.a": -torch.ones(2, 3, dtype=torch.float64),
}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: {"prototype_sum.a": r["prototype_sum.a"]},
        lambda r: r | {"hits.a": torch.zeros((), dtype=torch.float64)},
        lambda r: r | {"prototype_sum.a": torch.zeros(1, 3, dtype=torch.float64)},
        lambda r: r | {"prototype_count.a": torch.ones(2)},
        lambda r: r | {"prototype_count.a": torch.tensor([1.0, float("nan")], dtype=torch.float64)},
        lambda r: r | {"prototype_count.a": torch.tensor([1.0, -1.0], dtype=torch.float64)},
    ],
    ids=["missing", "extra", "broadcastable", "dtype", "nan", "negative"],
)
def test_a_spoilt_report_is_refused(spoil):
    expected = Expected(SENT, REPORT, ("a", "b"))
    assert not isinstance(admit(reply(report=FULL), TASK, expected, 10), Refusal)
    found = admit(reply(report=spoil(FULL)), TASK, expected, 10)
    assert isinstance(found, Refusal)
    assert found.kind == "report"


def test_an_optional_block_is_left_out_as_a_whole_or_not_at_all():
    sent = SENT | {"encoder.a.b": torch.zeros(1)}
    expected = Expected(sent, {}, ("a", "b"), optional=frozenset({"encoder.a"}))
    head = {"head.joint.w": torch.zeros(3)}
    assert set(admit(reply(model=head), TASK, expected, 10).model) == set(head)
    assert set(admit(reply(model=sent), TASK, expected, 10).model) == set(sent)
    for part in (SENT, {n: sent[n] for n in ("encoder.a.w", "encoder.a.b")}):
        found = admit(reply(model=part), TASK, expected, 10)
        assert isinstance(found, Refusal)
        assert found.kind == "blocks"


def test_more_samples_than_the_client_has_are_refused():
    assert isinstance(admit(reply(), TASK, Expected(SENT, {}, ("a", "b")), 9), Refusal)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_bad_number_is_enough(value):
    assert verdict(reply(model=SENT | {"head.joint.w": torch.tensor([0.0, value, 0.0])})) == "finite"


def test_blocks_that_were_not_asked_for_are_refused():
    assert verdict(reply(model=SENT | {"encoder.b.w": torch.zeros(2)})) == "blocks"


@pytest.mark.parametrize("samples", [0, -3, 2.5, "many", None])
def test_impossible_sample_counts_are_refused(samples):
    honest = reply()
    text = honest.content["reply"]["header"].replace('"samples": 10', f'"samples": {json.dumps(samples)}')
    honest.content["reply"] = ConfigRecord({"header": text})
    assert verdict(honest) == "samples"


@pytest.mark.parametrize("header", ["", "null", "[]", "{}", '{"round": 3}', '{"modalities": 5}', "not json"])
def test_headers_that_cannot_be_read_are_refused(header):
    broken = reply()
    broken.content["reply"] = ConfigRecord({"header": header})
    assert verdict(broken) == "malformed"


@pytest.mark.parametrize("missing", ["reply", "report"])
def test_records_that_are_missing_are_refused(missing):
    broken = reply()
    del broken.content[missing]
    assert verdict(broken) == "malformed"


def test_a_reply_without_a_model_is_refused():
    broken = reply()
    del broken.content["model"]
    assert verdict(broken) == "blocks"


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"\x00" * 40])
def test_arrays_that_cannot_be_read_are_refused(data):
    broken = reply()
    broken.content["model"] = ArrayRecord({"encoder.a.w": Array("float32", (2,), "numpy.ndarray", data)})
    assert verdict(broken) == "malformed"


def test_arrays_of_objects_are_refused():
    broken = reply()
    array = Array("object", (1,), "numpy.ndarray", np.array(["x"]).tobytes())
    broken.content["report"] = ArrayRecord({"hits": array})
    assert isinstance(parse(broken, TASK), Refusal)


def test_strings_are_no_numbers():
    broken = reply()
    broken.content["report"] = ArrayRecord({"hits": Array(np.array(["x", "y"]))})
    assert verdict(broken) == "malformed"
