"""What holds for all tests."""

import pytest
from hypothesis import settings

from fedmm import native

# A machine may be busy: only tests that are about time look at the clock.
settings.register_profile("fedmm", deadline=None)
settings.load_profile("fedmm")


def pytest_runtest_setup(item):
    if item.get_closest_marker("kernels") and native.library is None:
        pytest.skip("there are no compiled kernels")
