"""Logging of the API process: text or JSON lines, each with the id of the request that it belongs to.

What is noted about a request while it runs comes out with the one line that ends it.
"""

import logging
import time
from contextvars import ContextVar
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

_request: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)


def begin_request(request_id: str) -> dict[str, Any]:
    """From here on, in this task and those it starts, log lines belong to this request."""
    fields = {"request_id": request_id}
    _request.set(fields)
    return fields


def note(**fields: Any) -> None:
    """Add to what the request's last line will say; seconds to the microsecond, and None is nothing."""
    current = _request.get()
    if current is not None:
        for name, value in fields.items():
            if value is not None:
                current[name] = round(value, 6) if isinstance(value, float) else value


def configure_logging(level: str, form: LogFormat) -> None:
    """Set up the root logger, on the standard error output. `level` is a name as logging has it, in any case."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if form == "json" else _Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # They tell of each request that they make or serve; our own line does.
    for noisy in ("httpx", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(_request.get() or {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = {**(_request.get() or {}), **getattr(record, "fields", {})}
        if not fields:
            return line
        head, newline, rest = line.partition("\n")
        return f"{head} {' '.join(f'{name}={value}' for name, value in fields.items())}{newline}{rest}"
