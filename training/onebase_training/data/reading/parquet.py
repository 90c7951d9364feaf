"""Parquet and Arrow to records, by pyarrow, which is optional.

Columns of class numbers come out as names where the file has them, as Hugging Face's `datasets` writes it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onebase_adapters.errors import DataError
from onebase_training.data.reading.text_files import Record


def read_table_records(source: str, files: Sequence[Path]) -> list[Record]:
    """The rows of all `files` (.parquet or .arrow), one after the other, numbered through. Raises DataError."""
    records: list[Record] = []
    for path in files:
        for row in _rows(path):
            records.append(Record(source, len(records) + 1, row))
    return records


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow: install onebase[data], or write the data as .jsonl.", field="data"
        ) from error
    try:
        if path.suffix == ".parquet":
            table = parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                table = ipc.open_stream(mapped).read_all()
        names = _class_names(table.schema.metadata or {})
        for row in table.to_pylist():
            yield {column: _named(value, names.get(column)) for column, value in row.items()}
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}", field="data") from error


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column to the names of its classes, for a column of class numbers or of lists of them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    names: dict[str, list[str]] = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and isinstance(inner.get("names"), list):
            names[column] = inner["names"]
    return names


def _named(value: Any, names: list[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    # -1 is `datasets`' sign for "no label": it stays a null, and is refused as one.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
