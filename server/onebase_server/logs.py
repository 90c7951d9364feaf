"""Logging of the API process and of the engine's: text or JSON lines, each with the ids of the requests that it
belongs to.

What is noted about a request while it runs comes out with the one line that ends it. The engine knows a request by
the `id` of that line, with the number of the sequence behind it.
"""

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import msgspec

from onebase_engine.engine_config import LogFormat, LogLevel

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


def note_ignored(field: str) -> None:
    """Add to the fields of the request that change nothing: its line and its reply's headers name them."""
    current = _request.get()
    if current is not None and field not in (ignored := current.setdefault("ignored", [])):
        ignored.append(field)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """For logging's `extra`: what a line has of its own."""
    return {"fields": values}


def configure_logging(level: LogLevel, form: LogFormat, *, process: str | None = None) -> None:
    """Set up the root logger, on the standard error output. `level` is a name as logging has it, in any case;
    `process` stands in each line."""
    handler = logging.StreamHandler()
    own = {} if process is None else {"process": process}
    handler.setFormatter(_JsonLines(own) if form == "json" else _Text(own))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # They tell of each request that they make or serve; our own line does.
    for noisy in ("httpx", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _JsonLines(logging.Formatter):
    def __init__(self, own: Mapping[str, Any]) -> None:
        super().__init__()
        self._own = own

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._own,
            **(_request.get() or {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(document, enc_hook=str).decode()


class _Text(logging.Formatter):
    def __init__(self, own: Mapping[str, Any]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._own = own

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = {**self._own, **(_request.get() or {}), **getattr(record, "fields", {})}
        if not fields:
            return line
        head, newline, rest = line.partition("\n")
        return f"{head} {' '.join(f'{name}={value}' for name, value in fields.items())}{newline}{rest}"
