"""Workers that cannot start, or a Ray that cannot: one clear message within a minute of the libraries' import."""

import time

import pytest
from drill import ROOT, finish, left, mapped, settings, start, wait_for

PLUGIN = """
import sys
if sys.argv[0].endswith("default_worker.py"):
    import a_package_that_workers_do_not_have
from fedmm.objectives.joint import Joint as Mine
"""

KILLED_AT_ONCE = """
import os, sys
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    os.kill(os.getpid(), 9)
"""

KILLED_WHEN_IT_IMPORTS = """
import os, sys
class Killer:
    def find_spec(self, name, *_):
        if name == "clients.crew":
            os.kill(os.getpid(), 9)
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    sys.meta_path.insert(0, Killer())
"""


def failure(tmp_path, config, **environment):
    """What a run says that must fail, soon and cleanly."""
    process = start(config, tmp_path / "run", "--engine", "ray", "--json", **environment)
    wait_for(process, lambda: mapped(process, "_raylet"))  # on a busy machine, imports alone take long
    began = time.monotonic()
    printed, errors = finish(process, 4)
    assert time.monotonic() - began < 60
    assert printed == ""
    assert left(process.pid, 20) == {}
    (message,) = [line for line in errors.splitlines() if line.startswith("fedmm: ")]
    return message


def test_a_plug_in_that_workers_cannot_import(tmp_path):
    (tmp_path / "a_plug_in.py").write_text(PLUGIN)
    config = settings("fedavg", objective__name="a_plug_in:Mine")
    message = failure(tmp_path, config, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert "a_package_that_workers_do_not_have" in message


@pytest.mark.slow
@pytest.mark.parametrize("what", [KILLED_AT_ONCE, KILLED_WHEN_IT_IMPORTS])
def test_workers_that_are_killed_at_each_start(tmp_path, what):
    (tmp_path / "sitecustomize.py").write_text(what)
    message = failure(tmp_path, settings("fedavg"), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "worker" in message
    assert "engine=inproc" in message


@pytest.mark.slow
def test_a_ray_that_cannot_start(tmp_path):
    message = failure(tmp_path, settings("fedavg"), RAY_gcs_storage="nowhere")
    assert "Ray does not start" in message
    assert "engine=inproc" in message
