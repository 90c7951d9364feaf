"""Files to records: what the bytes say, before anyone asks what the columns mean.

A line of JSON that is none is a DataError in the place of its record, so that the others are still read.

Every record knows its place, so that each later complaint names the line. Text is UTF-8 and nothing else.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
    _read: set[str] = field(default_factory=set, compare=False)
    _passed: set[str] = field(default_factory=set, compare=False)

    def value(self, column: str) -> Any:
        """Return the column's value, or None; the column counts as used."""
        self._read.add(column)
        return self.columns.get(column)

    def pass_over(self, fields: Iterable[str]) -> None:
        """Remember fields within a column of which nothing is made."""
        self._passed.update(fields)

    @property
    def unused(self) -> set[str]:
        """Columns, and fields within others, that hold something of which nothing was made."""
        return self._passed.union(
            name
            for name, value in self.columns.items()
            if name not in self._read and value not in (None, "", [], {})
        )

    def error(self, message: str, *, field: str | None = None) -> DataError:
        """To be raised: `message` with the record's place before it."""
        return DataError(f"{self.source}, line {self.line}: {message}", field=field)


def read_text_records(path: Path, content: bytes) -> list[Record | DataError]:
    """All records of the JSONL, JSON or CSV file at `path`, which holds `content`, maybe compressed (.gz, .zst).
    Raises DataError."""
    source = str(path)
    if path.suffix.lower() in _COMPRESSED:
        content, path = _COMPRESSED[path.suffix.lower()](source, content), path.with_suffix("")
    text = _decode(source, content)
    if "\n" not in text:  # as old Macs ended lines
        text = text.replace("\r", "\n")
    return list(_reader(path, text)(source, text)) if text.strip() else []


def _gunzip(source: str, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be decompressed: {error}.", field="data") from error


def _unzstd(source: str, content: bytes) -> bytes:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{source} needs pyarrow: install onebase[data], or decompress it.", field="data"
        ) from error
    try:
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
            whole: bytes = stream.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be decompressed: {error}.", field="data") from error
    return whole


_COMPRESSED = {".gz": _gunzip, ".zst": _unzstd}


def _reader(path: Path, text: str) -> Callable[[str, str], Iterator[Record | DataError]]:
    suffix, begins = path.suffix.lower(), text.lstrip()[:1]
    if suffix in (".csv", ".tsv"):
        return _csv
    # Many a .json file holds an object in each line, and what comes out of a pipe has no suffix at all.
    if suffix in (".json", ".jsonl", ".ndjson", "") and begins == "[":
        return _json_array
    if suffix == ".json" and begins == "{":
        return _json_object
    if suffix in (".json", ".jsonl", ".ndjson", "") and (suffix or begins == "{"):
        return _json_lines
    raise DataError(
        f"{path}: cannot tell what this is. Files are .jsonl, .json, .csv, .tsv (also .gz or .zst) or .parquet, "
        'or a folder that Hugging Face\'s datasets saved. Plain text is a line of {"text": ...} for each document.',
        field="data",
    )


def _json_object(source: str, text: str) -> Iterator[Record | DataError]:
    """A file that is one object: records wrapped in it, columns as pandas writes them, or else an object a line."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        yield from _json_lines(source, text)
        return
    columns = list(whole.values())
    if columns and all(isinstance(column, dict) for column in columns):
        if len({tuple(column) for column in columns}) > 1:
            raise DataError(f"{source}: its columns do not have the same rows.", field="data")
        for number, row in enumerate(columns[0], 1):
            yield Record(source, number, {name: column[row] for name, column in whole.items()})
        return
    tables = [value for value in columns if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(tables) == 1 and not any(name in whole for name in _CHATS):
        for number, value in enumerate(tables[0], 1):
            yield _record(source, number, value)
        return
    yield _record(source, 1, whole)


_CHATS = ("messages", "conversations", "conversation")
"""Lists of objects that are no records."""


def _json_lines(source: str, text: str) -> Iterator[Record | DataError]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            columns = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                yield _half_written(source, number, error)
            else:
                yield DataError(f"{source}, line {number}: not JSON: {error}.")
            continue
        yield _record(source, number, columns)


def _json_array(source: str, text: str) -> Iterator[Record | DataError]:
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
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # 131,072 characters otherwise
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


def _record(source: str, line: int, value: Any) -> Record | DataError:
    if not isinstance(value, dict):
        return DataError(f"{source}, line {line}: expected an object, found {type(value).__name__}.")
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
