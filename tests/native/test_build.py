"""The compiled kernels are there after an install, and can be done without."""

import os
import shutil
import subprocess
import sys

import pytest

from fedmm import native


def test_they_are_built_where_there_is_a_compiler():
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    if os.environ.get("FEDMM_KERNELS"):
        pytest.skip("the environment says whether there shall be kernels")
    assert native.library is not None


def test_a_user_can_do_without():
    code = "from fedmm import native; print(native.library, native.instructions())"
    environment = os.environ | {"FEDMM_KERNELS": "off"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["None", "None"]


def test_a_library_of_another_version_is_passed_by(monkeypatch):
    monkeypatch.setattr(native, "_VERSION", -1)
    assert native._load() is None
