"""The metrics for Prometheus: the engine's state as it is at a scrape, and each request's latencies.

What vLLM has too goes by vLLM's name, so that its dashboards and gateways work; `adapter` is a label of ours. Only
so many adapters get a label of their own; the rest are counted together as `other`.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from onebase_server.api.adapters.directory import AdapterDirectory
from onebase_server.engine_process.engine_client import EngineClient

_OTHER = "other"
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_LABELS = ("model_name", "adapter")


class Metrics:
    """One server's metrics. Belongs to the event loop of its engine client."""

    def __init__(
        self, engine: EngineClient, adapters: AdapterDirectory, base_name: str, *, most_adapters: int = 100
    ) -> None:
        """`most_adapters` get a label of their own: the first that are asked for."""
        self.registry = CollectorRegistry()
        self._base = base_name
        self._most_adapters = most_adapters
        self._labels: set[str] = set()
        self._in_flight: Tally[str] = Tally()
        self.registry.register(_EngineState(engine, adapters, base_name, self._in_flight))
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Until the first token", _SECONDS)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens", _SECONDS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Until its prompt is computed", _SECONDS)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Of a whole sequence", _SECONDS)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens generated", _TOKENS)
        self._ended = Counter(
            "vllm:request_success",
            "Sequences that ended, by reason: stop, length, abort (its client left) or error",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._http = Counter(
            "onebase:http_requests", "Answers", ("handler", "method", "status"), registry=self.registry
        )

    def sequence(self, name: str, prompt_tokens: int) -> "SequenceTimer":
        """Watch a sequence under the adapter (or base) of this name."""
        return SequenceTimer(self, name, prompt_tokens)

    def answered(self, handler: str, method: str, status: int) -> None:
        """Count an answer. `handler` is a route, not a path: there are few of them."""
        self._http.labels(handler, method, str(status)).inc()

    def _label(self, name: str) -> str:
        if name == self._base or name in self._labels:
            return name
        if len(self._labels) >= self._most_adapters:
            return _OTHER
        self._labels.add(name)
        return name

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, _LABELS, registry=self.registry, buckets=buckets)


class SequenceTimer:
    """One sequence, from its submission to its end; tells the metrics."""

    __slots__ = (
        "_between",
        "_generated",
        "_labels",
        "_last",
        "_metrics",
        "_name",
        "_prompt_tokens",
        "_started",
        "first_token",
        "waited",
    )

    def __init__(self, metrics: Metrics, name: str, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._name = name
        self._prompt_tokens = prompt_tokens
        self._labels = (metrics._base, metrics._label(name))
        self._between = metrics._between.labels(*self._labels)
        self._started = self._last = 0.0
        self._generated = 0
        self.first_token: float | None = None
        """Seconds until it came."""
        self.waited = 0.0
        """Seconds in the engine's queue, as the engine tells."""

    def __enter__(self) -> "SequenceTimer":
        self._started = time.perf_counter()
        self._metrics._in_flight[self._name] += 1
        return self

    def got(self, tokens: int) -> None:
        """So many tokens have come at once."""
        now = time.perf_counter()
        if self._generated:
            for _ in range(tokens):
                self._between.observe((now - self._last) / tokens)
        else:
            self.first_token = now - self._started
            self._metrics._first_token.labels(*self._labels).observe(self.first_token)
        self._generated += tokens
        self._last = now

    def end(self, reason: str) -> None:
        """It has ended with an answer."""
        metrics, labels = self._metrics, self._labels
        metrics._ended.labels(*labels, reason).inc()
        metrics._queue.labels(*labels).observe(self.waited)
        metrics._whole.labels(*labels).observe(time.perf_counter() - self._started)
        metrics._prompt.labels(*labels).observe(self._prompt_tokens)
        metrics._generated.labels(*labels).observe(self._generated)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        in_flight = self._metrics._in_flight
        in_flight[self._name] -= 1
        if not in_flight[self._name]:
            del in_flight[self._name]
        if kind is not None:
            reason = "error" if issubclass(kind, Exception) else "abort"
            self._metrics._ended.labels(*self._labels, reason).inc()


class _EngineState(Collector):
    """The engine's snapshot, read when it is asked for. Its counters begin anew when the engine does."""

    def __init__(
        self, engine: EngineClient, adapters: AdapterDirectory, base_name: str, in_flight: Tally[str]
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._base = base_name
        self._in_flight = in_flight

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the engine, which may not have started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families."""
        stats = self._engine.stats
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield self._gauge("onebase:engine_ready", "1 while requests are taken", float(self._engine.ready))
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the cache in use, 0 to 1", used)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated", stats.generated_tokens)
        queries = stats.prompt_tokens + stats.cached_tokens
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache", queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache", stats.cached_tokens)
        yield self._counter("vllm:num_preemptions", "Sequences put back for want of memory", stats.preemptions)
        yield self._counter("onebase:steps", "Forward passes", stats.steps)
        told = "Seconds in the model, up to the last hidden states"
        yield self._counter("onebase:model_seconds", told, stats.model_seconds)
        entries = self._adapters.entries()
        served = sum(entry.problem is None for entry in entries)
        states = GaugeMetricFamily("onebase:adapters", "Adapters by state", labels=("model_name", "state"))
        for state, count in [
            ("served", served),
            ("not_served", len(entries) - served),
            ("resident", stats.adapters_loaded),
        ]:
            states.add_metric((self._base, state), count)
        yield states
        yield self._gauge("onebase:adapter_bytes", "Memory of the resident adapters", stats.adapter_bytes)
        yield self._counter("onebase:adapter_loads", "Adapters made resident", stats.adapter_loads)
        yield self._counter("onebase:adapter_evictions", "Adapters that left for another", stats.adapter_evictions)
        yield self._lora()

    def _lora(self) -> Metric:
        """vLLM's way to tell routers which adapters are at work: in labels, at the time that is the value."""
        names = ",".join(sorted(name for name in self._in_flight if name != self._base))
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters at work",
            labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        family.add_metric((str(self._engine.info.max_adapters), "", names), time.time())
        return family

    def _gauge(self, name: str, what: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, what, labels=("model_name",))
        family.add_metric((self._base,), value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=("model_name",))
        family.add_metric((self._base,), value)
        return family
