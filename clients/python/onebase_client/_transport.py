"""The rules of sending, apart from the waiting: headers, when to try again and after how long, errors, events."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from onebase_client._calls import Call
from onebase_client.errors import ApiError, ConnectionFailedError, ProtocolError, from_document

T = TypeVar("T")

_LONGEST_WAIT = 60.0
_REFUSED_FOR_NOW = (429, 503)
DONE = "[DONE]"


def server_url(url: str) -> str:
    """Without the `/v1` that OpenAI's client wants: paths have it."""
    return url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class Settings:
    """How a client reaches its server."""

    api_key: str | None
    admin_key: str | None
    max_retries: int

    def arguments(self, call: Call[Any]) -> dict[str, Any]:
        """httpx's arguments for a call, but for its files."""
        key = self.admin_key or self.api_key if call.admin else self.api_key or self.admin_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        given: dict[str, Any] = {"method": call.method, "url": call.path.removeprefix("/"), "headers": headers}
        if call.json is not None:
            given["json"] = {name: value for name, value in call.json.items() if value is not None}
        if call.form is not None:
            given["data"] = dict(call.form)
        return given

    def wait_after_status(self, response: httpx.Response, tries: int) -> float | None:
        """Seconds to wait before another try; None if there is to be none."""
        if response.status_code not in _REFUSED_FOR_NOW or tries > self.max_retries:
            return None
        asked = retry_after(response.headers)
        return _backoff(tries) if asked is None else asked if asked <= _LONGEST_WAIT else None

    def wait_after_failure(self, error: httpx.TransportError, call: Call[Any], tries: int) -> float:
        """The same for a request without an answer. Raises ConnectionFailedError where it is not to be repeated."""
        unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if (unsent or call.repeatable) and tries <= self.max_retries and not isinstance(error, httpx.ReadTimeout):
            return _backoff(tries)
        raise connection_failed(error) from error


def connection_failed(error: httpx.TransportError) -> ConnectionFailedError:
    """Our error for httpx's."""
    return ConnectionFailedError(f"{type(error).__name__}: {error}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds (the form that OneBase sends)."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _backoff(tries: int) -> float:
    """Half a second, doubled with each try, with some chance in it: many clients should not come back at once."""
    return min(0.5 * 2.0 ** (tries - 1), 8.0) * random.uniform(0.75, 1.0)


def error_of(response: httpx.Response) -> ApiError:
    """The error in a response that was read."""
    try:
        document = response.json()
    except ValueError:
        document = None
    return from_document(
        document,
        status=response.status_code,
        request_id=response.headers.get("x-request-id"),
        retry_after=retry_after(response.headers),
    )


def result_of(call: Call[T], response: httpx.Response) -> T:
    """A call's result. Raises ApiError or ProtocolError."""
    if response.is_error:
        raise error_of(response)
    try:
        document = response.json()
    except ValueError as error:
        raise ProtocolError(f"{call.method} {call.path}: the answer is not JSON.") from error
    return call.read(document)


def data_of(line: str) -> str | None:
    """Return the data of a stream's line, if it has any; DONE is the last."""
    return line.removeprefix("data:").strip() if line.startswith("data:") else None


def event_of(call: Call[T], data: str) -> T:
    """An event's result. Raises ApiError or ProtocolError."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise ProtocolError(f"{call.method} {call.path}: an event is not JSON.") from error
    if isinstance(document, dict) and "error" in document:
        raise from_document(document)
    return call.read(document)
