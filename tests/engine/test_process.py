"""The engine in its own process: what it answers, that every request ends once, and that it comes back."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from onebase_adapters.errors import AdapterFormatError, BaseModelError
from onebase_engine.base.base_spec import BaseSpec
from onebase_engine.engine_config import EngineConfig
from onebase_engine.request import EngineRequest, Output, SamplingParams
from onebase_engine.startup import start_engine
from onebase_server.engine_process.engine_client import EngineUnavailableError, QueueFullError
from onebase_server.engine_process.supervisor import ProcessEngine
from support.engines import Driver, engine_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = (5, 9, 300, 41, 7)
ENDLESS = 240


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(llama: Path, loras: list[Path]) -> AsyncIterator[ProcessEngine]:
    """One process for all tests of this file, in their order; the first adapter is loaded."""
    process = ProcessEngine(engine_config(llama, max_running=4, max_waiting=4))
    await process.start()
    await process.load_adapter("first", str(loras[0]))
    yield process
    process.kill()
    await process.stop(0)


def request(name: str, adapter: str | None = None, **sampling: Any) -> EngineRequest:
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling)
    return EngineRequest(name, PROMPT, params, adapter)


async def collect(engine: ProcessEngine, asked: EngineRequest) -> list[Output]:
    return [output async for output in engine.generate(asked)]


async def started(engine: ProcessEngine, count: int) -> None:
    """Wait until so many requests run."""
    async with asyncio.timeout(20):
        while engine.stats.running < count:
            await asyncio.sleep(0.005)


def tokens(outputs: list[Output]) -> list[int]:
    assert [output.finish_reason is not None for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return [token for output in outputs for token in output.tokens]


async def test_answers_as_an_engine_in_this_process(engine: ProcessEngine, llama: Path, loras: list[Path]) -> None:
    here = start_engine(engine_config(llama), progress=lambda _: None)
    driver = Driver(here, loras[:1])
    driver.submit("base", PROMPT)
    driver.submit("adapted", PROMPT, loras[0])
    driver.run()
    here.close()
    base, adapted = await asyncio.gather(
        collect(engine, request("base")), collect(engine, request("adapted", "first"))
    )
    assert tokens(base) == driver.results["base"].tokens
    assert tokens(adapted) == driver.results["adapted"].tokens
    assert engine.info.fingerprint == here.info.fingerprint
    assert engine.stats.blocks_used == 0


async def test_its_room_is_known_before_the_first_request(llama: Path) -> None:
    fresh = ProcessEngine(engine_config(llama))
    await fresh.start()
    assert fresh.stats.blocks_free == fresh.stats.blocks_total > 0
    await fresh.stop(1)


async def test_refuses_as_an_engine_in_this_process(engine: ProcessEngine) -> None:
    for asked, kind in ((request("large", max_tokens=1000), "too_large"), (request("other", "none"), "adapter")):
        (only,) = await collect(engine, asked)
        assert (only.finish_reason, only.error_kind) == ("error", kind)


async def test_a_bad_adapter_comes_back_as_its_own_error(engine: ProcessEngine, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterFormatError, match="pickle") as caught:
        await engine.load_adapter("bad", str(tmp_path))
    assert caught.value.field == "path"


async def test_an_adapter_is_unloaded_when_its_requests_have_ended(
    engine: ProcessEngine, loras: list[Path]
) -> None:
    await engine.load_adapter("second", str(loras[1]))
    running = asyncio.create_task(collect(engine, request("long", "second", max_tokens=ENDLESS)))
    await started(engine, 1)
    await engine.unload_adapter("second")
    assert running.done() or engine.stats.running == 0
    assert len(tokens(await running)) == ENDLESS
    (only,) = await collect(engine, request("late", "second"))
    assert only.error_kind == "adapter"


async def test_a_caller_that_leaves_frees_its_blocks(engine: ProcessEngine) -> None:
    generating = engine.generate(request("left", max_tokens=ENDLESS))
    await anext(generating)
    await generating.aclose()
    # The next request's outputs tell that the engine has nothing else.
    await collect(engine, request("after", max_tokens=2))
    assert (engine.stats.running, engine.stats.waiting, engine.stats.blocks_used) == (0, 0, 0)


async def test_a_full_queue_refuses(engine: ProcessEngine) -> None:
    waiting = [asyncio.create_task(collect(engine, request(f"r{i}", max_tokens=30))) for i in range(8)]
    await started(engine, 1)
    with pytest.raises(QueueFullError) as caught:
        await collect(engine, request("ninth"))
    assert caught.value.retry_after >= 1
    assert [len(tokens(outputs)) for outputs in await asyncio.gather(*waiting)] == [30] * 8
    await collect(engine, request("ninth"))


async def test_a_kill_ends_each_request_once_and_the_engine_comes_back(engine: ProcessEngine) -> None:
    before = tokens(await collect(engine, request("before", "first")))
    adapters = [None, "first", None, "first", None, "first"]
    loads = [
        asyncio.create_task(collect(engine, request(f"r{i}", adapter, max_tokens=ENDLESS)))
        for i, adapter in enumerate(adapters)
    ]
    await started(engine, 4)
    old = engine.pid
    os.kill(old, signal.SIGKILL)
    for outputs in await asyncio.gather(*loads):
        tokens(outputs)
        assert (outputs[-1].finish_reason, outputs[-1].error_kind) == ("error", "engine_died")
    assert not engine.ready
    with pytest.raises(EngineUnavailableError) as caught:
        await collect(engine, request("early"))
    assert caught.value.retry_after >= 1
    with pytest.raises(EngineUnavailableError):
        await engine.load_adapter("first", "anywhere")
    async with asyncio.timeout(60):
        while not engine.ready:
            await asyncio.sleep(0.05)
    assert engine.pid != old
    assert tokens(await collect(engine, request("after", "first"))) == before
    assert engine.stats.blocks_used == 0


async def test_a_drain_finishes_what_can_be_and_aborts_the_rest(engine: ProcessEngine) -> None:
    short = asyncio.create_task(collect(engine, request("short", max_tokens=5)))
    long = [
        asyncio.create_task(collect(engine, request(f"long{i}", "first", max_tokens=ENDLESS))) for i in range(7)
    ]
    await started(engine, 4)
    child = psutil.Process(engine.pid)
    stopping = asyncio.create_task(engine.stop(0.05))
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailableError):
        await collect(engine, request("late"))
    async with asyncio.timeout(10):
        await stopping
    assert (await short)[-1].finish_reason == "length"
    endings = [(await task)[-1].finish_reason for task in long]
    assert set(endings) <= {"length", "abort"}
    assert "abort" in endings, "all were done within the grace: nothing was tested"
    assert not child.is_running()
    with pytest.raises(EngineUnavailableError):
        await collect(engine, request("too late"))


async def test_a_base_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    process = ProcessEngine(EngineConfig(base=BaseSpec(str(tmp_path), device="cpu")))
    with pytest.raises(BaseModelError, match="unheard-of"):
        await process.start()
    assert not process.ready
    await process.stop(0)
