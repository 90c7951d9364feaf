"""From a path to a checked data set."""

import hashlib
from pathlib import Path

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Dataset
from onebase_training.data.files import read_records
from onebase_training.data.formats import FORMATS, recognise


def read_dataset(path: Path, *, format: str | None = None) -> Dataset:
    """Read a data file; its format is recognised from its columns unless `format` names it.

    Raises DataError, which names the line, for whatever is not as it should be.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.", field="data") from error
    records = read_records(path, content)
    if not records:
        raise DataError(f"{path} is empty: it has no records.", field="data")
    name = recognise(records[0], format)
    examples = tuple(FORMATS[name].convert(record) for record in records)
    return Dataset(examples, name, str(path), hashlib.sha256(content).hexdigest())
