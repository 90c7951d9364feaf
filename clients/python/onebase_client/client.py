"""The two clients: `OneBase`, and `AsyncOneBase` with the same methods to await."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import httpx

from onebase_client import _calls as calls
from onebase_client import models
from onebase_client._calls import Call
from onebase_client._transport import (
    DONE,
    Settings,
    connection_failed,
    data_of,
    error_of,
    event_of,
    result_of,
    server_url,
)
from onebase_client.errors import ConnectionFailedError

T = TypeVar("T")

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_BROKEN_OFF = "The stream ended before its last event."


class OneBase:
    """A OneBase server. Thread-safe; close it, or use it in a `with` block.

    Every method raises branches of `OneBaseError`. What the server refuses for the moment (429, 503) is tried again
    up to `max_retries` times, after as long as its Retry-After says.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | httpx.Timeout = _TIMEOUT,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url` is the server's, with or without `/v1`. `timeout` is in seconds, for each wait."""
        self._settings = Settings(api_key, admin_key, max_retries)
        self._http = httpx.Client(base_url=server_url(base_url), timeout=timeout, transport=transport)
        self.adapters = Adapters(self)

    def complete(
        self, prompt: models.Prompt, *, model: str | None = None, **options: Unpack[models.CompletionOptions]
    ) -> models.Completion:
        """Continue a prompt; `model` is an adapter's name, or None for the base."""
        return self._call(calls.complete(prompt, model, options))

    def complete_stream(
        self, prompt: models.Prompt, *, model: str | None = None, **options: Unpack[models.CompletionOptions]
    ) -> Generator[models.Completion, None, None]:
        """The same, piece by piece; the last has the usage and no choices. Closing it stops the server."""
        return self._stream(calls.complete_stream(prompt, model, options))

    def chat(
        self,
        messages: Sequence[models.Message],
        *,
        model: str | None = None,
        **options: Unpack[models.ChatOptions],
    ) -> models.Chat:
        """Answer a conversation."""
        return self._call(calls.chat(messages, model, options))

    def chat_stream(
        self,
        messages: Sequence[models.Message],
        *,
        model: str | None = None,
        **options: Unpack[models.ChatOptions],
    ) -> Generator[models.ChatChunk, None, None]:
        """The same, piece by piece; see `complete_stream`."""
        return self._stream(calls.chat_stream(messages, model, options))

    def classify(
        self,
        texts: models.Prompt,
        *,
        model: str | None = None,
        adapters: Sequence[models.AdapterPart] | None = None,
    ) -> list[models.Classification]:
        """Label texts, or each of their tokens, by the head of the adapter `model`, or of one of `adapters`."""
        return self._call(calls.classify(texts, model, adapters))

    def embed(
        self,
        texts: models.Prompt,
        *,
        model: str | None = None,
        adapters: Sequence[models.AdapterPart] | None = None,
    ) -> list[models.Embedding]:
        """Vectors of texts."""
        return self._call(calls.embed(texts, model, adapters))

    def list_models(self) -> list[models.Model]:
        """The base and every adapter that is served."""
        return self._call(calls.list_models())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, call: Call[T]) -> T:
        response = self._send(call, stream=False)
        return result_of(call, response)

    def _stream(self, call: Call[T]) -> Generator[T, None, None]:
        response = self._send(call, stream=True)
        try:
            if response.is_error:
                response.read()
                raise error_of(response)
            for line in response.iter_lines():
                data = data_of(line)
                if data == DONE:
                    return
                if data is not None:
                    yield event_of(call, data)
            raise ConnectionFailedError(_BROKEN_OFF)
        except httpx.TransportError as error:
            raise connection_failed(error) from error
        finally:
            response.close()

    def _send(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        tries = 0
        while True:
            tries += 1
            try:
                with call.files() as files:
                    request = self._http.build_request(**self._settings.arguments(call), files=files)
                    response = self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                wait: float | None = self._settings.wait_after_failure(error, call, tries)
            else:
                wait = self._settings.wait_after_status(response, tries)
                if wait is None:
                    return response
                response.close()
            time.sleep(wait or 0.0)


class Adapters:
    """The administration of a server's adapters; needs its admin key."""

    def __init__(self, client: OneBase) -> None:
        self._client = client

    def register(
        self,
        name: str,
        *,
        path: str | None = None,
        upload: Path | str | None = None,
        replace: bool = False,
    ) -> models.Adapter:
        """Make an adapter servable as `model=name`: from `path`, a folder below the server's adapter root, or by
        uploading a folder (or zip) of this machine. `replace` makes a new version of a name that is taken. Raises
        AdapterRefusedError, AdapterExistsError."""
        return self._client._call(calls.register(name, calls.Source.of(path, upload), replace))

    def add_version(
        self,
        name: str,
        *,
        path: str | None = None,
        upload: Path | str | None = None,
        promote: bool = True,
    ) -> models.Adapter:
        """A new version of an adapter. Without `promote` the name goes on to mean the current one; try the new
        one as `model="name@version"`. Raises AdapterRefusedError, NotFoundError."""
        return self._client._call(calls.add_version(name, calls.Source.of(path, upload), promote))

    def promote(self, name: str, version: int) -> models.Adapter:
        """Make a version the one that the name means. Raises NotFoundError."""
        return self._client._call(calls.promote(name, version))

    def rollback(self, name: str) -> models.Adapter:
        """Go back to the version that was current before the last change. Raises NotFoundError."""
        return self._client._call(calls.rollback(name))

    def list(self) -> list[models.Adapter]:
        """The current version of all that are registered."""
        return self._client._call(calls.list_adapters())

    def get(self, name: str) -> models.Adapter:
        """A name's current version, or a `name@version`. Raises NotFoundError."""
        return self._client._call(calls.get_adapter(name))

    def delete(self, name: str) -> None:
        """Take a name, or a `name@version`, away; what runs under it finishes. Raises NotFoundError."""
        self._client._call(calls.delete_adapter(name))


class AsyncOneBase:
    """`OneBase` for asyncio: the same methods, to be awaited, or iterated over with `async for`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        timeout: float | httpx.Timeout = _TIMEOUT,
        max_retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """See `OneBase`."""
        self._settings = Settings(api_key, admin_key, max_retries)
        self._http = httpx.AsyncClient(base_url=server_url(base_url), timeout=timeout, transport=transport)
        self.adapters = AsyncAdapters(self)

    async def complete(
        self, prompt: models.Prompt, *, model: str | None = None, **options: Unpack[models.CompletionOptions]
    ) -> models.Completion:
        """See `OneBase.complete`."""
        return await self._call(calls.complete(prompt, model, options))

    def complete_stream(
        self, prompt: models.Prompt, *, model: str | None = None, **options: Unpack[models.CompletionOptions]
    ) -> AsyncGenerator[models.Completion, None]:
        """See `OneBase.complete_stream`."""
        return self._stream(calls.complete_stream(prompt, model, options))

    async def chat(
        self,
        messages: Sequence[models.Message],
        *,
        model: str | None = None,
        **options: Unpack[models.ChatOptions],
    ) -> models.Chat:
        """See `OneBase.chat`."""
        return await self._call(calls.chat(messages, model, options))

    def chat_stream(
        self,
        messages: Sequence[models.Message],
        *,
        model: str | None = None,
        **options: Unpack[models.ChatOptions],
    ) -> AsyncGenerator[models.ChatChunk, None]:
        """See `OneBase.chat_stream`."""
        return self._stream(calls.chat_stream(messages, model, options))

    async def classify(
        self,
        texts: models.Prompt,
        *,
        model: str | None = None,
        adapters: Sequence[models.AdapterPart] | None = None,
    ) -> list[models.Classification]:
        """See `OneBase.classify`."""
        return await self._call(calls.classify(texts, model, adapters))

    async def embed(
        self,
        texts: models.Prompt,
        *,
        model: str | None = None,
        adapters: Sequence[models.AdapterPart] | None = None,
    ) -> list[models.Embedding]:
        """See `OneBase.embed`."""
        return await self._call(calls.embed(texts, model, adapters))

    async def list_models(self) -> list[models.Model]:
        """See `OneBase.list_models`."""
        return await self._call(calls.list_models())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, call: Call[T]) -> T:
        response = await self._send(call, stream=False)
        return result_of(call, response)

    async def _stream(self, call: Call[T]) -> AsyncGenerator[T, None]:
        response = await self._send(call, stream=True)
        try:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            async for line in response.aiter_lines():
                data = data_of(line)
                if data == DONE:
                    return
                if data is not None:
                    yield event_of(call, data)
            raise ConnectionFailedError(_BROKEN_OFF)
        except httpx.TransportError as error:
            raise connection_failed(error) from error
        finally:
            await response.aclose()

    async def _send(self, call: Call[Any], *, stream: bool) -> httpx.Response:
        tries = 0
        while True:
            tries += 1
            try:
                with call.files() as files:
                    request = self._http.build_request(**self._settings.arguments(call), files=files)
                    response = await self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                wait: float | None = self._settings.wait_after_failure(error, call, tries)
            else:
                wait = self._settings.wait_after_status(response, tries)
                if wait is None:
                    return response
                await response.aclose()
            await asyncio.sleep(wait or 0.0)


class AsyncAdapters:
    """See `Adapters`."""

    def __init__(self, client: AsyncOneBase) -> None:
        self._client = client

    async def register(
        self,
        name: str,
        *,
        path: str | None = None,
        upload: Path | str | None = None,
        replace: bool = False,
    ) -> models.Adapter:
        """See `Adapters.register`."""
        return await self._client._call(calls.register(name, calls.Source.of(path, upload), replace))

    async def add_version(
        self,
        name: str,
        *,
        path: str | None = None,
        upload: Path | str | None = None,
        promote: bool = True,
    ) -> models.Adapter:
        """See `Adapters.add_version`."""
        return await self._client._call(calls.add_version(name, calls.Source.of(path, upload), promote))

    async def promote(self, name: str, version: int) -> models.Adapter:
        """See `Adapters.promote`."""
        return await self._client._call(calls.promote(name, version))

    async def rollback(self, name: str) -> models.Adapter:
        """See `Adapters.rollback`."""
        return await self._client._call(calls.rollback(name))

    async def list(self) -> list[models.Adapter]:
        """See `Adapters.list`."""
        return await self._client._call(calls.list_adapters())

    async def get(self, name: str) -> models.Adapter:
        """See `Adapters.get`."""
        return await self._client._call(calls.get_adapter(name))

    async def delete(self, name: str) -> None:
        """See `Adapters.delete`."""
        await self._client._call(calls.delete_adapter(name))
