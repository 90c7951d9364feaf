"""/metrics: the engine's snapshot and the requests' latencies, in Prometheus' format, with few labels."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_server.api.services import ApiSettings, Services

Samples = dict[tuple[str, tuple[str, ...]], float]


async def scrape(http: httpx.AsyncClient) -> Samples:
    """Values by name and label values, without the base's name and the creation times."""
    reply = await http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    found: Samples = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                labels = tuple(value for name, value in sample.labels.items() if name != "model_name")
                found[sample.name, labels] = sample.value
    return found


async def test_the_engines_state(http: httpx.AsyncClient, engine: Any) -> None:
    engine.stats = msgspec.structs.replace(
        engine.stats,
        adapter_loads=9,
        adapter_evictions=8,
        running=3,
        waiting=4,
        blocks_total=100,
        blocks_used=25,
        prompt_tokens=70,
        cached_tokens=30,
    )
    found = await scrape(http)
    assert found["vllm:num_requests_running", ()] == 3
    assert found["vllm:num_requests_waiting", ()] == 4
    assert found["vllm:kv_cache_usage_perc", ()] == 0.25
    assert found["vllm:prompt_tokens_total", ()] == 70
    assert found["vllm:prefix_cache_queries_total", ()] == 100
    assert found["vllm:prefix_cache_hits_total", ()] == 30
    assert found["onebase:adapter_loads_total", ()] == 9
    assert found["onebase:adapter_evictions_total", ()] == 8
    assert found["onebase:engine_ready", ()] == 1
    engine.ready = False
    assert (await scrape(http))["onebase:engine_ready", ()] == 0


async def test_latencies_and_tokens(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50] * 5)
    engine.delay = 0.002
    for stream in (False, True):
        await http.post("/v1/completions", json={"prompt": [60, 61, 62], "n": 2, "stream": stream})
    found = await scrape(http)
    labels = ("tiny",)
    assert found["vllm:time_to_first_token_seconds_count", labels] == 4
    assert 0.008 <= found["vllm:time_to_first_token_seconds_sum", labels] < 4
    assert found["vllm:inter_token_latency_seconds_count", labels] == 4 * 4
    assert 0.03 <= found["vllm:inter_token_latency_seconds_sum", labels] < 16
    assert found["vllm:e2e_request_latency_seconds_count", labels] == 4
    assert found["vllm:request_prompt_tokens_sum", labels] == 12
    assert found["vllm:request_generation_tokens_sum", labels] == 20
    assert found["vllm:request_success_total", ("tiny", "stop")] == 4
    assert found["onebase:http_requests_total", ("/v1/completions", "POST", "200")] == 2


async def test_endings(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 1})
    engine.reply = lambda request: reply([50], finish_reason="error", error_kind="internal")
    await http.post("/v1/completions", json={"prompt": "abc"})
    engine.reply = lambda request: reply([50] * 100)
    engine.delay = 0.01
    running = asyncio.create_task(http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 100}))
    await asyncio.sleep(0.03)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    found = await scrape(http)
    reasons = {labels[1]: value for (name, labels), value in found.items() if name == "vllm:request_success_total"}
    assert reasons == {"length": 1, "error": 1, "abort": 1}


async def test_routes_and_statuses(http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={"prompt": ""})
    for name in ("a", "b", "c"):
        await http.get(f"/v1/models/{name}")
        await http.get(f"/nowhere/{name}")
    found = await scrape(http)
    answers = {labels: value for (name, labels), value in found.items() if name == "onebase:http_requests_total"}
    assert answers == {
        ("/v1/completions", "POST", "400"): 1,
        ("/v1/models/{name:path}", "GET", "404"): 3,
        ("unmatched", "GET", "404"): 3,
    }


@pytest.fixture
async def two_labels(
    engine: Any, codec: Any, store: AdapterStore, tmp_path: Path, new_adapter: Callable[..., Path]
) -> Services:
    """A server with five adapters, of which two may have labels."""
    services = Services.over(engine, codec, store, ApiSettings("tiny", metric_adapters=2))
    for number in range(5):
        folder = new_adapter(tmp_path / str(number), bytes([number]))
        await services.adapters.register(f"a{number}", lambda folder=folder: store.stage(folder))  # type: ignore[misc]
    return services


async def test_few_adapters_have_a_label(two_labels: Services, in_process: Any, engine: Any) -> None:
    async with in_process(two_labels) as http:
        for number in (3, 0, 1, 2, 4, 3):
            await http.post("/v1/completions", json={"model": f"a{number}", "prompt": "x"})
        found = await scrape(http)
        counts = {labels[0]: v for (name, labels), v in found.items() if name == "vllm:request_success_total"}
        assert counts == {"a3": 2, "a0": 1, "other": 3}
        assert found["onebase:adapters", ("served",)] == 5
        assert found["onebase:adapters", ("resident",)] == engine.stats.adapters_loaded


async def test_adapters_at_work(two_labels: Services, in_process: Any, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50] * 100)
    engine.delay = 0.01
    async with in_process(two_labels) as http:
        running = [
            asyncio.create_task(http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 9}))
            for name in ("a4", "a1", "a1", "tiny")
        ]
        await asyncio.sleep(0.03)
        during = await scrape(http)
        await asyncio.gather(*running)
        after = await scrape(http)

    def at_work(found: Samples) -> list[str]:
        return [labels[1] for name, labels in found if name == "vllm:lora_requests_info"]

    assert at_work(during) == ["a1,a4"]
    assert at_work(after) == [""]
