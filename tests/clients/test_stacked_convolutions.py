"""Convolutional clients in a stack on a CPU end where each ends alone; a part of a stack has the very bits of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.cohort import Member, train_stack
from clients.crew import work
from clients.trainer import LocalSchedule, train
from clients.workspace import Workspace
from experiments.bench.workloads import Workload
from fedmm import native
from fedmm.config.schema import ModelConfig, Plugin
from fedmm.data.federation import Pool
from fedmm.jobs import Shared, Train, arrays
from fedmm.models import build_model
from fedmm.models.stacked import Stack
from fedmm.objectives import build_objective
from fedmm.spec import client_spec
from fedmm.types import ModalitySpec

SIZES = (13, 26, 9, 17)
SHAPES = {"image": (1, 9, 10), "spectrogram": (2, 8, 7)}
LARGE = {"image": (1, 40, 34)}  # PyTorch normalises no single value
SCHEDULES = [LocalSchedule(1 + k % 2, 6 + k, 0.02, 0.9, 1e-3, clip=5.0) for k in range(len(SIZES))]


def pool(shapes):
    rng = np.random.default_rng(0)
    n = sum(SIZES)
    return Pool(
        {m: torch.tensor(rng.normal(size=(n, *shape))) for m, shape in shapes.items()},
        {m: torch.ones(n, dtype=torch.bool) for m in shapes},
        torch.tensor(rng.integers(0, 3, n)),
        np.cumsum(SIZES) - np.array(SIZES),
        np.array(SIZES),
        3,
        frozenset(shapes),
        (tuple(shapes),) * len(SIZES),
    )


@pytest.mark.parametrize(
    ("encoder", "norm", "shapes"),
    [*((e, n, SHAPES) for e in ("cnn", "convnet") for n in ("none", "group")), ("resnet18", "group", LARGE)],
)
def test_together_as_alone(encoder, norm, shapes):
    shown = tuple(shapes)
    config = ModelConfig(encoder=encoder, norm=norm, features=6, width=4)
    specs = {m: ModalitySpec("image", shapes[m]) for m in shapes}
    model, samples = build_model(specs, 3, config, 0).double(), pool(shapes)
    received = {n: t.clone() for n, t in model.state_dict().items()}
    objective = build_objective(Plugin(name="joint"))
    order = [2, 0, 3, 1]
    members = [Member(k, SCHEDULES[k]) for k in order]
    told = {"round": torch.tensor(0)}
    twin = Stack(model)
    together = train_stack(twin, received, objective, samples, members, shown, told, 3, 1)
    for place, k in enumerate(order):
        model.load_state_dict(received)
        alone = train(model, objective, samples.client(k), shown, told, SCHEDULES[k], 3, 1, k)
        assert set(alone.model) == set(together.model)
        for n, t in alone.model.items():
            torch.testing.assert_close(twin.plain(n, together.model[n])[place], t, rtol=1e-12, atol=1e-12)
            assert not torch.equal(t, received[n]), n


@pytest.fixture(scope="module")
def jobs():
    """A round of two stacks of a small convolutional workload, as one job; and what it shares."""
    workload = Workload("test", "cnn", 6, 24, registered=8, norm="group")
    spec = client_spec(workload.config({"name": "inproc"}, 1))
    here = Workspace(spec, None)
    sizes = here.pool("train").sizes
    assert len({-(-n // 8) for n in sizes.tolist()}) > 2, "widths differ"
    places = (0, 1, 2, 4, 5, 6)
    job = Train(
        1,
        0,
        (0, 8),
        places,
        (0, 1, 2, 3, 4, 5),
        (("first", "second"),) * 6,
        (1.0,) * 6,
        1,
        0.05,
        cohort=4,
        leaf=4,
        each=True,
    )
    return job, Shared(spec, model=arrays(here.model.state_dict()))


def bits(job, shared):
    return {s.place: {n: a.tobytes() for n, a in s.model.items()} for s in work(job, shared).singles}


@pytest.mark.kernels
def test_a_client_split_off_its_stack_has_the_same_bits(jobs):
    job, shared = jobs
    whole = bits(job, shared)
    parts = job.split()
    assert [part.places for part in parts] == [(place,) for place in job.places]
    for part in parts:
        assert bits(part, shared) == {part.places[0]: whole[part.places[0]]}
        assert part.split()[0].company == part.company


@pytest.mark.kernels
def test_one_by_one_has_the_same_bits(jobs):
    job, shared = jobs
    assert bits(replace(job, cohort=1), shared) == bits(job, shared)


def test_many_channels_are_left_to_the_plain_model(jobs, monkeypatch):
    job, shared = jobs
    monkeypatch.setattr("clients.workspace.NARROW", 8)
    here = Workspace(shared.spec, None)
    assert here.stack_for(1) is None
    assert here.stack_for(4) is here.stack is not None
    one = bits(replace(job, cohort=1), shared)
    assert one != bits(job, shared)
    data = here.data(0, "train")
    schedule = LocalSchedule(1, 32, 0.05, 0.9, 0.0)
    told = {"round": torch.tensor(0)}
    alone = train(here.model, here.objective, data, data.modalities, told, schedule, here.config.seed, 1, 0)
    assert one[0] == {n: a.tobytes() for n, a in arrays(alone.model).items()}


def test_without_kernels_a_single_client_is_left_to_the_plain_model(jobs, monkeypatch):
    _, shared = jobs
    monkeypatch.setattr(native, "library", None)
    assert Workspace(shared.spec, None).stack_for(1) is None
