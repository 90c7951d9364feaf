"""OpenTelemetry: one span for each request that runs something, as a child of its caller's, where there is one.

Names are OpenTelemetry's for generative AI, and vLLM's (`gen_ai.latency...`) for what those lack. A span tells what
the request's log line does. Needs the `otel` extra, so it is imported only where traces are switched on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
    "/v1/classify": "classify",
}
"""The paths that are traced, and the name of each one's operation."""
_ATTRIBUTES = {
    "request_id": "onebase.request_id",
    "client_gone": "onebase.client_gone",
    "status": "http.response.status_code",
    "error": "error.type",
    "id": "gen_ai.response.id",
    "model": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "first_token_seconds": "gen_ai.latency.time_to_first_token",
    "queue_seconds": "gen_ai.latency.time_in_queue",
    "seconds": "gen_ai.latency.e2e",
}
"""By what is noted of a request."""


class Tracing:
    """Makes the spans and sends them off, in a thread of its own."""

    def __init__(self, exporter: SpanExporter, base_name: str) -> None:
        self._base = base_name
        resource = Resource.create({SERVICE_NAME: "onebase", SERVICE_VERSION: version("onebase")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("onebase")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, base_name: str) -> "Tracing":
        """To a collector that takes OTLP over HTTP; `endpoint` is its URL without `/v1/traces`."""
        return cls(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"), base_name)

    @contextmanager
    def request(self, scope: Scope, fields: dict[str, Any]) -> Iterator[None]:
        """Around one request; `fields` is what will have been noted of it. The log gets the trace's id."""
        operation = _OPERATIONS.get(scope["path"]) if scope["method"] == "POST" else None
        if operation is None:
            yield
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(operation, self._propagator.extract(headers), SpanKind.SERVER)
        fields["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        span.set_attribute("gen_ai.operation.name", operation)
        span.set_attribute("gen_ai.provider.name", "onebase")
        span.set_attribute("http.request.method", scope["method"])
        span.set_attribute("http.route", scope["path"])
        try:
            yield
        finally:
            self._finish(span, operation, fields)

    def _finish(self, span: Span, operation: str, fields: Mapping[str, Any]) -> None:
        for name, attribute in _ATTRIBUTES.items():
            if name in fields:
                span.set_attribute(attribute, fields[name])
        model = fields.get("model")
        if model is not None:
            span.update_name(f"{operation} {model}")
            span.set_attribute("gen_ai.request.model", model)
            if model != self._base:
                span.set_attribute("onebase.adapter", model)
        if "error" in fields and fields.get("status", 500) not in range(400, 500):
            span.set_status(StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left. May wait for the collector, for seconds."""
        self._provider.shutdown()
