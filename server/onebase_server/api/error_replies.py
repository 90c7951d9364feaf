"""Every error as OpenAI's clients expect it: a status, and `{"error": {message, type, param, code}}`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from onebase_adapters.errors import (
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    OneBaseError,
    StorageError,
    did_you_mean,
)
from onebase_engine.text.answer import GenerationError
from onebase_server.engine_process.engine_client import EngineUnavailableError, QueueFullError
from onebase_server.jobs.job_store import FileInUseError, JobsElsewhereError, UnknownFileError, UnknownJobError
from onebase_server.logs import note

_INVALID = "invalid_request_error"


class InvalidRequestError(OneBaseError):
    """The request cannot be served as it is; `field` says which of its fields is wrong."""

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message, field=field)
        self.code = code


class UnauthorizedError(OneBaseError):
    """No key, or a wrong one."""


class ForbiddenError(OneBaseError):
    """The server is not set up to allow this to anyone."""


@dataclass(frozen=True)
class ErrorReply:
    """The reply that tells a client of an error."""

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON document."""
        content = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": content})

    def response(self) -> Response:
        """The HTTP response."""
        return Response(self.body(), self.status, dict(self.headers), media_type="application/json")


INTERNAL = ErrorReply(500, "The server failed; its log says why.", "server_error", code="internal_error")

# An engine's error kinds: status, and seconds until another try makes sense.
_GENERATION: Mapping[str, tuple[int, str, int | None]] = {
    "too_large": (400, _INVALID, None),
    "adapter": (400, _INVALID, None),
    "composition": (400, _INVALID, None),
    "task": (400, _INVALID, None),
    "grammar": (400, _INVALID, None),
    "engine_died": (503, "server_error", 5),
    "shutting_down": (503, "server_error", 5),
    "out_of_memory": (503, "server_error", 1),
}


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def reply_to(error: Exception) -> ErrorReply:
    """Map an error of ours, of validation or of the framework to what the client is told."""
    match error:
        case InvalidRequestError():
            return ErrorReply(400, error.message, param=error.field, code=error.code)
        case UnauthorizedError():
            headers = {"www-authenticate": "Bearer"}
            return ErrorReply(401, error.message, "authentication_error", code="invalid_api_key", headers=headers)
        case ForbiddenError():
            return ErrorReply(403, error.message, "permission_error", code="forbidden")
        case AdapterNotFoundError():
            return ErrorReply(404, error.message, param=error.field, code="model_not_found")
        case UnknownFileError() | UnknownJobError():
            return ErrorReply(404, error.message, param=error.field, code="not_found")
        case JobsElsewhereError():
            return ErrorReply(409, error.message, param=error.field, code="jobs_elsewhere")
        case FileInUseError():
            return ErrorReply(409, error.message, param=error.field, code="file_in_use")
        case AdapterExistsError():
            return ErrorReply(409, error.message, param=error.field, code="adapter_exists")
        case AdapterError():
            return ErrorReply(400, error.message, param=error.field, code="invalid_adapter")
        case StorageError():
            return ErrorReply(507, error.message, "server_error", code="insufficient_storage")
        case QueueFullError():
            headers = {"retry-after": str(error.retry_after)}
            return ErrorReply(429, error.message, "rate_limit_error", code="queue_full", headers=headers)
        case EngineUnavailableError():
            headers = {"retry-after": str(error.retry_after)}
            return ErrorReply(503, error.message, "server_error", code="engine_unavailable", headers=headers)
        case GenerationError():
            status, kind, retry_after = _GENERATION.get(error.kind, (500, "server_error", None))
            headers = {} if retry_after is None else {"retry-after": str(retry_after)}
            return ErrorReply(status, error.message, kind, error.field, error.kind, headers)
        case OneBaseError():
            return ErrorReply(400, error.message, param=error.field)
        case RequestValidationError():
            return _reply_to_validation(error.errors())
        case HTTPException():
            return ErrorReply(
                error.status_code,
                str(error.detail),
                code=_HTTP_CODES.get(error.status_code),
                headers=error.headers or {},
            )
    return INTERNAL


async def handle(_: Request, error: Exception) -> Response:
    """The exception handler of the application."""
    return noted(reply_to(error)).response()


def noted(reply: ErrorReply) -> ErrorReply:
    """The same, once the request's log line knows of it."""
    note(error=reply.code or reply.type)
    return reply


def _reply_to_validation(errors: Sequence[Mapping[str, Any]]) -> ErrorReply:
    """Name the field, in words that do not need pydantic to be understood."""
    messages = []
    for error in errors[:3]:
        name = _field_name(error["loc"])
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", "")
            return ErrorReply(400, f"The body is not valid JSON: {reason} at character {error['loc'][-1]}.")
        if error["type"] == "unknown_fields":
            return _reply_to_unknown(name, error["ctx"]["unknown"], error["ctx"]["known"])
        if error["type"] == "missing" and not name:
            messages.append("The request has no body; send JSON with content-type application/json.")
        elif error["type"] == "missing":
            messages.append(f"Field {name!r} is required.")
        elif error["type"] in ("model_attributes_type", "model_type", "dict_type") and not name:
            messages.append("The body must be a JSON object, sent with content-type application/json.")
        else:
            said = str(error["msg"]).removeprefix("Value error, ").removesuffix(".")
            messages.append(f"{name}: {said}." if name else f"{said}.")
    return ErrorReply(400, " ".join(messages), param=_field_name(errors[0]["loc"]) or None)


def _reply_to_unknown(where: str, unknown: Sequence[str], known: Sequence[str]) -> ErrorReply:
    """Name all of them, and what may have been meant."""
    within = f"{where}." if where else ""
    named = [f"{within + name!r}{did_you_mean(name, known)}" for name in unknown]
    return ErrorReply(
        400, f"Unknown field{'s' if len(named) > 1 else ''} {', '.join(named)}.", param=within + unknown[0]
    )


def _field_name(location: Sequence[str | int]) -> str:
    name = ""
    for part in location[1:] if location and location[0] in ("body", "query", "path") else location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name
