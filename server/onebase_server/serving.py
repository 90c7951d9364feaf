"""Running the server: the port is claimed, the engine started, the adapters loaded; a signal drains and ends it."""

import asyncio
import importlib
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
import uvloop
from rich.console import Console

from onebase_adapters.errors import ConfigError
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.base.catalog import fetch_base
from onebase_engine.start_phases import Phases
from onebase_engine.text.tokenizer import TextCodec, load_codec
from onebase_server.engine_process.supervisor import ProcessEngine
from onebase_server.jobs.job_store import JobBook
from onebase_server.logs import configure_logging
from onebase_server.server_config import ServerConfig

if TYPE_CHECKING:  # an extra
    from onebase_server.api.tracing import Tracing
if TYPE_CHECKING:  # imported while the engine loads
    from fastapi import FastAPI

    from onebase_server.api.services import Services

T = TypeVar("T")

_SLOW_CLIENT_SECONDS = 5
"""After the engine has drained, what clients get to read the rest."""


def run(config: ServerConfig) -> int:
    """Serve until told to stop; returns the exit status. Raises ConfigError, BaseModelError or StorageError."""
    configure_logging(config.engine.log_level, config.engine.log_format)
    tracing = _tracing(config)
    # Before the model is loaded: a port in use should not cost the wait.
    with (
        claim_port(config.host, config.port) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_serve(config, listener, tracing))


def _tracing(config: ServerConfig) -> "Tracing | None":
    """Raises ConfigError."""
    if config.otlp_endpoint is None:
        return None
    if not config.otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"--otlp-endpoint {config.otlp_endpoint!r} is no URL: it begins with http:// or https://.",
            field="otlp_endpoint",
        )
    try:
        from onebase_server.api.tracing import Tracing
    except ImportError as error:
        raise ConfigError(
            f"--otlp-endpoint needs OpenTelemetry ({error.name} is missing): pip install 'onebase[otel]'.",
            field="otlp_endpoint",
        ) from error
    return Tracing.to(config.otlp_endpoint, config.base_name)


def claim_port(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"--host {host} is no address of this machine: {error.strerror}.", field="host"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Choose another with --port.", field="port"
        ) from error
    return listener


async def _serve(config: ServerConfig, listener: socket.socket, tracing: "Tracing | None") -> int:
    # Where logs are JSON, nothing else is on the standard error output.
    console = Console(stderr=config.engine.log_format == "text", highlight=False, soft_wrap=True)
    engine = ProcessEngine(config.engine)
    with (
        _Signals() as signals,
        closing(AdapterStore(config.store)) as store,
        closing(JobBook(config.jobs_folder)) as book,
    ):
        services = None
        try:
            services = await signals.unless_stopped(_start(config, engine, store, book, console))
            if services is None:
                return 130
            from onebase_server.api.app import create_app
            from onebase_server.greeting import greet

            around = tracing.request if tracing is not None else None
            server = _Server(_uvicorn_config(create_app(services, around=around)))
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(server.serve(sockets=[listener]))
                greet(console, config, services, listener)
                await signals.unless_stopped(asyncio.wait([serving]))
                console.print("finishing what is in flight; once more to stop at once")
                drained = await signals.unless_stopped(_drain(engine, services, config.grace), second=True)
                server.should_exit = True
                server.force_exit = drained is None
            return 130 if server.force_exit else 0
        finally:
            if services is not None:
                await services.runner.stop()
            engine.kill()
            await engine.stop(0)
            if services is not None:
                await _within(_SLOW_CLIENT_SECONDS, services.adapters.settle())
            if tracing is not None:
                await asyncio.to_thread(tracing.close)


async def _start(
    config: ServerConfig, engine: ProcessEngine, store: AdapterStore, book: JobBook, console: Console
) -> "Services":
    say: Callable[[str], None] = console.print
    phases = Phases(say)
    phases.begin(f"fetching {config.engine.base.model}")
    folder = await asyncio.to_thread(fetch_base, config.engine.base.model, progress=say)
    say(f"loading {config.engine.base.model}")
    phases.begin("")  # the engine speaks for itself
    codec, _, _ = await asyncio.gather(
        asyncio.to_thread(_ready_codec, folder),
        asyncio.to_thread(importlib.import_module, "onebase_server.api.app"),
        engine.start(),
    )
    from onebase_server.api.services import ApiSettings, Services

    settings = ApiSettings(
        base_name=config.base_name,
        adapter_root=config.adapter_root,
        admin_key=config.admin_key,
        api_keys=config.api_keys,
        allowed_origins=config.allowed_origins,
    )
    services = Services.over(engine, codec, store, settings, book=book, jobs=config.jobs)
    phases.begin("loading adapters")
    await services.adapters.load_all()
    phases.end()
    await services.runner.start()
    return services


def _ready_codec(folder: Path) -> TextCodec:
    codec = load_codec(folder)
    codec.warm_up()
    return codec


async def _drain(engine: ProcessEngine, services: "Services", grace: float) -> bool:
    # The socket stays open meanwhile: new requests get 503 with Retry-After, /health too.
    begun = time.monotonic()
    await _within(grace, services.adapters.close())
    await engine.stop(max(0.0, grace - (time.monotonic() - begun)))
    return True


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """Let work that changes adapters end, if it does in time: it writes to a store that is about to be closed."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us: first the engine drains, then connections are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_config(app: "FastAPI") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SLOW_CLIENT_SECONDS,
    )


class _Signals:
    """Ctrl-C and SIGTERM as events: the first asks to finish, the second to stop at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __enter__(self) -> "_Signals":
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, T], *, second: bool = False) -> T | None:
        """The result of `work`, or None if a signal (or only a second one) came before; work is then cancelled."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future((self.second if second else self.first).wait())
        try:
            await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            for task in (working, waiting):
                task.cancel()
            await asyncio.gather(working, waiting, return_exceptions=True)
