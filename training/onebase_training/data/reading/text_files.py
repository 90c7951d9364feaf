"""Files to records: what the bytes say, before anyone asks what the columns mean.

Every record knows its place, so that each later complaint names the line. Text is UTF-8 and nothing else.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_adapters.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    source: str
    line: int
    """1-based; where the record begins, if it has several lines."""
    columns: Mapping[str, Any]

    def error(self, message: str, *, field: str | None = None) -> DataError:
        """To be raised: `message` with the record's place before it."""
        return DataError(f"{self.source}, line {self.line}: {message}", field=field)


def read_text_records(path: Path, content: bytes) -> list[Record]:
    """All records of the JSONL, JSON or CSV file at `path`, which holds `content`. Raises DataError."""
    source = str(path)
    text = _decode(source, content)
    return list(_reader(path, text)(source, text)) if text.strip() else []


def _reader(path: Path, text: str) -> Callable[[str, str], Iterator[Record]]:
    suffix, begins = path.suffix.lower(), text.lstrip()[:1]
    if suffix in (".csv", ".tsv"):
        return _csv
    # Many a .json file holds an object in each line, and what comes out of a pipe has no suffix at all.
    if suffix in (".json", ".jsonl", ".ndjson", "") and begins == "[":
        return _json_array
    if suffix in (".json", ".jsonl", ".ndjson", "") and (suffix or begins == "{"):
        return _json_lines
    raise DataError(
        f"{path}: cannot tell what this is. Files are .jsonl, .json, .csv, .tsv or .parquet, or a folder that "
        "Hugging Face's datasets saved.",
        field="data",
    )


def _json_lines(source: str, text: str) -> Iterator[Record]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                raise _half_written(source, number, error) from error
            raise DataError(f"{source}, line {number}: not JSON: {error}.") from error
        yield _record(source, number, columns)


def _json_array(source: str, text: str) -> Iterator[Record]:
    # Element by element, because only so each has a line number.
    decoder = json.JSONDecoder()
    at = _skip_space(text, text.index("[") + 1)
    line = 1 + text.count("\n", 0, at)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if not text.rstrip().endswith("]"):
                raise _half_written(source, line, error) from error
            raise DataError(f"{source}, line {line}: not JSON: {error}.") from error
        yield _record(source, line, value)
        after = _skip_space(text, end)
        if text[after : after + 1] == ",":
            after = _skip_space(text, after + 1)
        elif after == len(text):
            raise _half_written(source, line, "the array is not closed")
        elif text[after] != "]":
            raise DataError(f"{source}, line {line}: expected ',' or ']' after this record.")
        line += text.count("\n", at, after)
        at = after
    if text[at + 1 :].strip():
        raise DataError(f"{source}, line {line}: something follows after the end of the array.")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _csv(source: str, text: str) -> Iterator[Record]:
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            if row and not header:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise DataError(f"{source}, line {line}: two columns have the same name: {header}.")
            elif row:
                if len(row) != len(header):
                    raise DataError(
                        f"{source}, line {line}: {len(row)} fields, but the header names {len(header)} columns. "
                        "A field that holds the delimiter or a newline needs quotes around it."
                    )
                yield Record(source, line, dict(zip(header, row, strict=True)))
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}, line {line}: not CSV: {error}.") from error


def _record(source: str, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{source}, line {line}: expected an object, found {type(value).__name__}.")
    return Record(source, line, value)


def _half_written(source: str, line: int, reason: object) -> DataError:
    return DataError(
        f"{source}, line {line}: the file ends in the middle of a record: half written ({reason}). "
        "Remove that record, or write the file again."
    )


def _decode(source: str, content: bytes) -> str:
    """The text of UTF-8 `content`, with or without a byte order mark. Raises DataError with byte and line."""
    mark = b"\xef\xbb\xbf"
    try:
        return content.removeprefix(mark).decode()
    except UnicodeDecodeError as error:
        at = error.start + (len(mark) if content.startswith(mark) else 0)
        line = content.count(b"\n", 0, at) + 1
        hint = " It begins like UTF-16." if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise DataError(
            f"{source}, line {line}: byte {at} (0x{content[at]:02x}) is not UTF-8.{hint} Save the file as UTF-8."
        ) from error
