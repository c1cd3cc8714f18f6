"""What holds for all tests."""

from hypothesis import settings

# A machine may be busy: only tests that are about time look at the clock.
settings.register_profile("fedmm", deadline=None)
settings.load_profile("fedmm")
