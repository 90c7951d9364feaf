"""The services behind the endpoints: the settings, and one bundle of the engine, the tokenizer and the adapters."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from starlette.requests import Request

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.adapters.directory import AdapterDirectory
from onebase_server.api.error_replies import ForbiddenError
from onebase_server.api.prometheus import Metrics
from onebase_server.engine_process.engine_client import EngineClient
from onebase_server.jobs.job_store import JobBook
from onebase_server.jobs.runner import JobRunner, JobSettings


@dataclass(frozen=True)
class ApiSettings:
    """The API's part of the configuration."""

    base_name: str
    """The `model` by which requests name the base itself."""
    adapter_root: Path | None = None
    """Adapters may be registered by path from below this folder only; None: not by path at all."""
    admin_key: str | None = None
    """Without one, the administration of adapters is closed."""
    api_keys: tuple[str, ...] = ()
    """Without any, inference is open."""
    allowed_origins: tuple[str, ...] = ()
    """Whose web pages may call the API."""
    max_body_bytes: int = 8 << 20
    """Largest JSON body, which is read in one go: while it is, nobody's stream goes on."""
    max_upload_bytes: int = 4 << 30
    metric_adapters: int = 100
    """Adapters with a label of their own in the metrics."""


@dataclass(frozen=True)
class Services:
    """Made once, at start-up."""

    engine: EngineClient
    codec: TextCodec
    store: AdapterStore
    adapters: AdapterDirectory
    metrics: Metrics
    jobs: JobRunner | None
    """To be started, and stopped, with the server; None where it trains nothing."""
    settings: ApiSettings
    started: int
    """Seconds since the epoch."""

    @classmethod
    def over(
        cls,
        engine: EngineClient,
        codec: TextCodec,
        store: AdapterStore,
        settings: ApiSettings,
        *,
        book: JobBook | None = None,
        jobs: JobSettings | None = None,
    ) -> Self:
        """The services over these parts; with a `book` and settings for `jobs` the server trains. Adapters and jobs
        are still to be taken up: `adapters.load_all()`, `jobs.start()`."""
        adapters = AdapterDirectory(engine, store, settings.base_name)
        metrics = Metrics(engine, adapters, settings.base_name, most_adapters=settings.metric_adapters)

        async def register(name: str, folder: Path) -> str:
            entry = await adapters.register(name, lambda: store.stage(folder), replace=True)
            version = entry.record.version
            return name if version == 1 else f"{name}@{version}"

        runner = JobRunner(book, jobs, register) if book is not None and jobs is not None else None
        return cls(engine, codec, store, adapters, metrics, runner, settings, int(time.time()))

    @property
    def runner(self) -> JobRunner:
        """The jobs. Raises ForbiddenError where there are none."""
        if self.jobs is None:
            raise ForbiddenError("This server trains nothing.")
        return self.jobs

    @property
    def book(self) -> JobBook:
        """The files and jobs' history. Raises ForbiddenError."""
        return self.runner.book

    def vocabulary(self) -> Mapping[str, int]:
        """The base's tokens with their numbers."""
        tokens: Mapping[str, int] = self.codec.tokenizer.get_vocab()
        return tokens

    @property
    def longest(self) -> int:
        """Most tokens that a request can have: the context, or the whole cache if that is smaller."""
        info = self.engine.info
        return min(info.context, info.cache_tokens)


def services_of(request: Request) -> Services:
    """The application's services."""
    services: Services = request.app.state.services
    return services
