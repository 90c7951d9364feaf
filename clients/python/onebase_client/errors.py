"""Every error that the client raises, as one tree that mirrors the server's: catch `OneBaseError` for all of them,
or a branch.

The class follows from the error's `code` where it has one of its own, else from the HTTP status.
"""

from collections.abc import Mapping
from typing import Any


class OneBaseError(Exception):
    """Root of the tree."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectionFailedError(OneBaseError):
    """No answer: the server cannot be reached, or the connection broke."""


class ProtocolError(OneBaseError):
    """The answer does not follow the protocol of a OneBase server."""


class ApiError(OneBaseError):
    """The server refused or failed."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where the error came as an event of a stream."""
        self.code = code
        self.param = param
        """The field of the request that is wrong."""
        self.request_id = request_id
        """To be found again in the server's log."""
        self.retry_after = retry_after
        """Seconds until another try makes sense, where the server says so."""


class InvalidRequestError(ApiError):
    """400 and other 4xx: the request cannot be served as it is; `param` names the field."""


class ContextLengthError(InvalidRequestError):
    """Prompt and completion do not fit in the context."""


class AdapterRefusedError(InvalidRequestError):
    """The adapter's files are unsafe, broken or for another base, or a request named one that is not served."""


class AuthenticationError(ApiError):
    """401: no key, or a wrong one."""


class ForbiddenError(ApiError):
    """403: the server is not set up to allow this to anyone."""


class NotFoundError(ApiError):
    """404: no model or adapter has this name."""


class AdapterExistsError(ApiError):
    """409: the name is taken."""


class BodyTooLargeError(ApiError):
    """413: more bytes than the server takes."""


class QueueFullError(ApiError):
    """429: too many requests wait."""


class ServerError(ApiError):
    """5xx: the server failed; its log says why."""


class UnavailableError(ServerError):
    """503: the engine is starting, restarting or draining, or died over this request."""


class StorageError(ServerError):
    """507: the server's disk refused."""


_BY_CODE: Mapping[str, type[ApiError]] = {
    "context_length_exceeded": ContextLengthError,
    "invalid_adapter": AdapterRefusedError,
    "invalid_api_key": AuthenticationError,
    "forbidden": ForbiddenError,
    "model_not_found": NotFoundError,
    "adapter_exists": AdapterExistsError,
    "body_too_large": BodyTooLargeError,
    "queue_full": QueueFullError,
    "engine_unavailable": UnavailableError,
    "engine_died": UnavailableError,
    "out_of_memory": UnavailableError,
    "shutting_down": UnavailableError,
    "insufficient_storage": StorageError,
}
_BY_STATUS: Mapping[int, type[ApiError]] = {
    401: AuthenticationError,
    403: ForbiddenError,
    404: NotFoundError,
    409: AdapterExistsError,
    413: BodyTooLargeError,
    429: QueueFullError,
    503: UnavailableError,
    507: StorageError,
}


def from_document(
    document: object,
    *,
    status: int | None = None,
    request_id: str | None = None,
    retry_after: float | None = None,
) -> ApiError:
    """The error for an OpenAI-shaped `{"error": {...}}`, or for whatever else came with a bad status."""
    given = document.get("error") if isinstance(document, dict) else None
    error: dict[str, Any] = given if isinstance(given, dict) else {}
    code = error.get("code")
    kind = _BY_CODE.get(code) if isinstance(code, str) else None
    if kind is None and status is not None:
        kind = _BY_STATUS.get(status, ServerError if status >= 500 else InvalidRequestError)
    if kind is None:
        kind = ServerError if error.get("type") == "server_error" else InvalidRequestError
    return kind(
        str(error.get("message") or f"The server answered with status {status}."),
        status=status,
        code=code if isinstance(code, str) else None,
        param=error.get("param"),
        request_id=request_id,
        retry_after=retry_after,
    )
