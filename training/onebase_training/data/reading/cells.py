"""Single values of a record, taken out and checked."""

import json
from collections.abc import Sequence
from typing import Any

from onebase_training.data.reading.text_files import Record

_ABSENT = object()


def text(record: Record, key: str, value: Any = _ABSENT) -> str:
    """The text in the column `key`, or `value`, which is then a part of it. Raises DataError."""
    if value is _ABSENT:
        if key not in record.columns:
            found = ", ".join(map(repr, record.columns)) or "none"
            raise record.error(f"the column {key!r} is missing (found: {found}).", field=key)
        value = record.value(key)
    if value is None:
        raise record.error(f"{key} is null.", field=key)
    if not isinstance(value, str):
        raise record.error(f"{key} must be text, found {type(value).__name__}.", field=key)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise record.error(f"{key} holds half of a surrogate pair (an escape such as \\ud83d alone).", field=key)
    return value


def written(record: Record, key: str) -> str:
    """As `text`; numbers and truth values as JSON writes them. Raises DataError."""
    value = record.value(key)
    return json.dumps(value) if isinstance(value, bool | int | float) else text(record, key)


def only_key(record: Record, names: Sequence[str]) -> str:
    """Which of the column names `names`, all for the same thing, the record uses. Raises DataError."""
    used = [name for name in names if name in record.columns]
    if len(used) > 1:
        raise record.error(f"the columns {', '.join(used)} mean the same: keep one.", field=used[1])
    return used[0] if used else names[0]


def optional(record: Record, names: Sequence[str]) -> str:
    """The text in whichever of the columns `names` the record has, or "". Raises DataError."""
    key = only_key(record, names)
    return text(record, key) if record.value(key) else ""


def listed(record: Record, key: str) -> list[Any]:
    """The list in the column `key`, which may be written as JSON. Raises DataError."""
    value = record.value(key)
    if isinstance(value, str):  # in CSV, and in files made from it
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise record.error(f"{key} is text, but no list as JSON: {error}.", field=key) from error
    if not isinstance(value, list) or not value:
        raise record.error(f"{key} must be a list with something in it.", field=key)
    return value


def task(record: Record) -> str:
    """The record's task, or ""."""
    return "" if record.value("task") is None else text(record, "task")
