"""OpenTelemetry's spans: one for each request that runs something, with what became of it."""

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from onebase_adapters.errors import ConfigError
from onebase_engine.engine_config import EngineConfig
from onebase_server.api.app import create_app
from onebase_server.api.services import Services
from onebase_server.api.tracing import Tracing
from onebase_server.jobs.runner import JobSettings
from onebase_server.server_config import ServerConfig
from onebase_server.serving import run

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "why"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "why"}]},
    "/v1/responses": {"input": "why"},
    "/v1/embeddings": {"input": ["why", "not"]},
}


class Traced:
    """A client of a traced application; `spans` sends what is waiting and returns it."""

    def __init__(self, services: Services) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter, services.settings.base_name)
        transport = httpx.ASGITransport(
            create_app(services, around=self.tracing.request), raise_app_exceptions=False
        )
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def spans(self) -> list[ReadableSpan]:
        self.tracing._provider.force_flush()
        found = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return found


@pytest.fixture
def traced(services: Services) -> Iterator[Traced]:
    made = Traced(services)
    yield made
    made.tracing.close()


@pytest.mark.parametrize("path", BODIES)
async def test_what_a_span_tells(traced: Traced, path: str) -> None:
    reply = await traced.http.post(path, json=BODIES[path], headers={"x-request-id": "mine"})
    assert reply.status_code == 200
    (span,) = traced.spans()
    told: Any = span.attributes
    operation = told["gen_ai.operation.name"]
    assert span.name == f"{operation} tiny"
    assert span.kind == SpanKind.SERVER
    assert span.parent is None
    assert span.status.status_code == StatusCode.UNSET
    assert (told["gen_ai.request.model"], told["gen_ai.response.model"]) == ("tiny", "tiny")
    assert (told["http.route"], told["http.response.status_code"]) == (path, 200)
    assert told["onebase.request_id"] == "mine"
    assert "onebase.adapter" not in told
    assert told["gen_ai.response.id"] == reply.json().get("id", told["gen_ai.response.id"])
    usage = reply.json()["usage"]
    assert told["gen_ai.usage.input_tokens"] == usage.get("prompt_tokens", usage.get("input_tokens"))
    assert told["gen_ai.latency.time_in_queue"] == 0.25
    assert 0 < told["gen_ai.latency.e2e"] < 10
    if path != "/v1/embeddings":
        assert told["gen_ai.usage.output_tokens"] == usage.get("completion_tokens", usage.get("output_tokens"))
        assert told["gen_ai.response.finish_reasons"] == ("stop",)
        assert 0 < told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"]


async def test_a_stream_under_an_adapter_is_a_child_of_its_caller(
    traced: Traced, services: Services, tmp_path: Path, new_adapter: Callable[..., Path]
) -> None:
    folder = new_adapter(tmp_path / "a")
    await services.adapters.register("a", lambda: services.store.stage(folder))
    body = {"prompt": "why", "model": "a", "stream": True, "n": 2, "max_tokens": 2}
    await traced.http.post("/v1/completions", json=body, headers={"traceparent": PARENT})
    (span,) = traced.spans()
    told: Any = span.attributes
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    assert f"{span.get_span_context().trace_id:032x}" in PARENT
    assert span.name == "text_completion a"
    assert told["onebase.adapter"] == "a"
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ("length", "length")


async def test_what_is_not_traced(traced: Traced) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        await traced.http.get(path)
    await traced.http.post("/tokenize", json={"prompt": "why"})
    await traced.http.get("/v1/completions")
    assert traced.spans() == []


async def test_failures(traced: Traced, engine: Any, reply: Any) -> None:
    async def span_of(**body: Any) -> tuple[Any, Any]:
        await traced.http.post("/v1/completions", json={"prompt": "why", **body})
        (span,) = traced.spans()
        return span.attributes, span.status.status_code

    told, status = await span_of(model="nobody")
    assert (told["error.type"], told["http.response.status_code"], status) == (
        "model_not_found",
        404,
        StatusCode.UNSET,
    )
    engine.reply = lambda _: reply((5,), "error", None, "engine_died")
    told, status = await span_of()
    assert (told["error.type"], told["http.response.status_code"], status) == ("engine_died", 503, StatusCode.ERROR)
    engine.reply = lambda _: reply((5, 6), "error", None, "engine_died")
    told, status = await span_of(stream=True)
    assert (told["error.type"], told["http.response.status_code"], status) == ("engine_died", 200, StatusCode.ERROR)
    engine.raises = ZeroDivisionError("a bug")
    told, status = await span_of()
    assert (told["error.type"], told["http.response.status_code"], status) == (
        "internal_error",
        500,
        StatusCode.ERROR,
    )


def test_spans_reach_a_collector(services: Services) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        tracing = Tracing.to(f"http://127.0.0.1:{server.server_port}/", "tiny")
        with tracing.request({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, {}):
            pass
        tracing.close()
        thread.join()
    (resource,) = got[0].resource_spans
    assert [span.name for span in resource.scope_spans[0].spans] == ["text_completion"]
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "onebase"


def config(tmp_path: Path, endpoint: str) -> ServerConfig:
    return ServerConfig(EngineConfig(), tmp_path, "tiny", JobSettings("tiny"), tmp_path, otlp_endpoint=endpoint)


def test_a_wrong_endpoint_and_a_missing_package_end_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="begins with http") as caught:
        run(config(tmp_path, "localhost:4318"))
    assert caught.value.field == "otlp_endpoint"
    monkeypatch.delitem(sys.modules, "onebase_server.api.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'onebase\[otel\]'"):
        run(config(tmp_path, "http://localhost:4318"))
