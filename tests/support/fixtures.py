"""Fixtures and settings for the tests of the adapters and of the engine; loaded by `tests/conftest.py`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no deadlines: the machine may be busy.
settings.register_profile("onebase", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("onebase")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What builds a model is marked so; `make quick` leaves it out."""
    for item in items:
        if "tiny_model" in getattr(item, "fixturenames", ()):
            item.add_marker("model")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model; see `support.models`."""
    from support.models import save_model

    return cache(lambda family: save_model(tmp_path_factory.mktemp("model") / family, family))


@pytest.fixture(scope="session")
def tiny_lora(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a LoRA adapter for a family's tiny model: `tiny_lora(family, **options)` as `save_lora`."""
    from support.models import save_lora

    def make(family: str, **options: Any) -> Path:
        return save_lora(tmp_path_factory.mktemp("adapter") / family, tiny_model(family), **options)

    return make
