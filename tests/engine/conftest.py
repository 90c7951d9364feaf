"""What the engine's tests share: a tiny model, three adapters, and engines over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onebase_engine.engine import Engine
from onebase_engine.startup import start_engine
from support.engines import Driver, engine_config


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def loras(tiny_lora: Callable[..., Path]) -> list[Path]:
    """Three ranks, three sets of sites."""
    return [
        tiny_lora("llama", rank=8, seed=1),
        tiny_lora("llama", rank=3, modules=["q_proj", "v_proj"], seed=2),
        tiny_lora("llama", rank=16, modules=["down_proj", "up_proj"], seed=3),
    ]


@pytest.fixture
def new_driver(llama: Path, loras: list[Path]) -> Iterator[Callable[..., Driver]]:
    """`new_driver(**options)`: an engine with `engine_config`'s options; the three adapters loaded."""
    engines: list[Engine] = []

    def make(folder: Path = llama, adapters: list[Path] = loras, **options: Any) -> Driver:
        engines.append(start_engine(engine_config(folder, **options), progress=lambda _: None))
        return Driver(engines[-1], adapters)

    yield make
    for engine in engines:
        engine.close()
