"""The seam between the API and the engine: what the API may ask, whatever stands behind it."""

from collections.abc import AsyncGenerator
from typing import Protocol

from onebase_adapters.errors import OneBaseError
from onebase_engine.engine_info import AdapterInfo, EngineInfo, EngineStats
from onebase_engine.request import EngineRequest, Output


class EngineUnavailableError(OneBaseError):
    """The engine is starting, restarting or draining: try again in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(OneBaseError):
    """As many requests wait as may: try again in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClient(Protocol):
    """An engine in reach. All methods belong to one asyncio event loop."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def ready(self) -> bool: ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[Output, None]:
        """Submit, and yield the outputs up to the one with a `finish_reason`. Outputs that piled up while the
        caller was busy come merged into one. Closing the generator early aborts the request.

        Raises EngineUnavailableError or QueueFullError at the first step, before anything is accepted."""
        ...

    async def load_adapter(self, digest: str, folder: str) -> AdapterInfo:
        """Make an adapter usable under its digest, now and after an engine restart. Raises AdapterError."""
        ...

    async def unload_adapter(self, digest: str) -> None:
        """Forget it; requests that use it finish first."""
        ...
