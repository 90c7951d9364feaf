"""Files to records: what the bytes say, before anyone asks what the columns mean.

Every record knows its place, so that each later complaint names the line.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    source: str
    line: int
    columns: Mapping[str, Any]

    def error(self, message: str, *, field: str | None = None) -> DataError:
        """To be raised: `message` with the record's place before it."""
        return DataError(f"{self.source}, line {self.line}: {message}", field=field)


def read_records(path: Path, content: bytes) -> list[Record]:
    """All records of the file at `path`, which holds `content`. Raises DataError."""
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}. Use .jsonl.")
    return list(_jsonl(str(path), content))


def _jsonl(source: str, content: bytes) -> Iterator[Record]:
    lines = decode(source, content).split("\n")
    last = next((number for number in range(len(lines), 0, -1) if lines[number - 1].strip()), 0)
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            columns = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f"{source}, line {number}"
            if number == last == len(lines):
                raise DataError(
                    f"{where}: the last line is half written (it has no newline, and is not JSON: {error}). "
                    "Remove it, or write the file again."
                ) from error
            raise DataError(f"{where}: not JSON: {error}.") from error
        if not isinstance(columns, dict):
            raise DataError(f"{source}, line {number}: expected an object, found {type(columns).__name__}.")
        yield Record(source, number, columns)


def decode(source: str, content: bytes) -> str:
    """The text of UTF-8 `content`, with or without a byte order mark. Raises DataError with byte and line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.object` may lack the mark's three bytes, which its offsets then do too.
        at = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, at) + 1
        hint = " It starts like UTF-16." if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{source}, line {line}: byte {at} (0x{content[at]:02x}) is not UTF-8.{hint} Save the file as UTF-8."
        ) from error
