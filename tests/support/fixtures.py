"""Fixtures and settings for the tests of the adapters and of the engine; loaded by `tests/conftest.py`."""

from hypothesis import settings

# The same examples in every run, and no deadlines: the machine may be busy.
settings.register_profile("onebase", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("onebase")
