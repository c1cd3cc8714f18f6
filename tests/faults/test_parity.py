"""The engine and the number of its workers change no bit of a result; messages instead of jobs change the last ones."""

import json

import pytest
from drill import METHODS, finish, result, settings, start, undisturbed

from experiments.runner import CLIENT_APP, CREW, run
from fedmm.engines import ray_workers
from fedmm.engines.inprocess import InProcessGrid
from fedmm.engines.ray_workers import RayGrid, RayPool


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Results of engine inproc by method."""
    found = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp(method) / "run"
        undisturbed(out, settings(method))
        found[method] = result(out)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Results of the same runs by one message a client, by method."""
    found = {}
    for method in METHODS:
        out, config = tmp_path_factory.mktemp(method) / "run", settings(method)
        run(config, out, grid=InProcessGrid(CLIENT_APP, config.scenario.clients))
        found[method] = result(out)
    return found


@pytest.fixture(scope="module")
def pools():
    """Pools of 1, 2 and 3 workers on one Ray instance."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_workers, "START_SECONDS", 150.0)  # for so many at once, on a machine that may be busy
        made = {workers: RayPool(CLIENT_APP, workers, CREW) for workers in (1, 2, 3)}
        yield made
        for pool in made.values():
            pool.close()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_ray_gives_the_same_bits(tmp_path, pools, expected, method, workers):
    config = settings(method, engine__name="ray", engine__workers=workers)
    pools[workers].wait(workers)
    summary = run(config, tmp_path, grid=RayGrid(pools[workers], config.scenario.clients))
    assert summary["weights_sha256"] == expected[method][0]["weights_sha256"]
    assert summary["engine"] == "ray"
    assert result(tmp_path) == expected[method]


@pytest.mark.parametrize("method", METHODS)
def test_who_is_which_node_changes_nothing(tmp_path, told, method):
    """Flower's node ids are random, so that sorting by them gives another order of clients each time."""
    config = settings(method)
    grid = InProcessGrid(CLIENT_APP, config.scenario.clients)
    for context, client in zip(grid.contexts.values(), (3, 0, 5, 1, 4, 2), strict=True):
        context.node_config["partition-id"] = client
    run(config, tmp_path, grid=grid)
    assert result(tmp_path) == told[method]


@pytest.mark.parametrize("method", METHODS)
def test_messages_give_what_jobs_give(expected, told, method):
    """To rounding: jobs have other shapes, for which some processors take other kernels."""
    by_jobs, by_messages = (
        {tuple(v for k, v in row.items() if k != "value"): row["value"] for row in map(json.loads, log.splitlines())}
        for _, log in (expected[method], told[method])
    )
    assert by_messages == pytest.approx(by_jobs, rel=1e-4, abs=1e-6)


def test_the_methods_differ(expected):
    assert len({summary["weights_sha256"] for summary, _ in expected.values()}) == len(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_flower_gives_the_same_bits(tmp_path, told, method):
    out = tmp_path / "run"
    finish(start(settings(method), out, "--engine", "flower"))
    assert result(out) == told[method]
