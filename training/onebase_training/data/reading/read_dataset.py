"""From paths to a checked data set."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Dataset, Example
from onebase_training.data.reading.formats import FORMATS, recognise
from onebase_training.data.reading.parquet import read_table_records
from onebase_training.data.reading.text_files import Record, read_text_records

_TABLES = (".parquet", ".arrow")
_SHOWN = 20
"""Bad records that are told one by one."""


def read_dataset(path: Path, *, format: str | None = None, skip_bad: bool = False) -> Dataset:
    """Read a data file or folder; its format is recognised from its columns unless `format` names it. With
    `skip_bad`, records that cannot be used are left out.

    Raises DataError, which names the lines, for whatever is not as it should be.
    """
    records, digest = _records(path)
    if not records:
        raise DataError(f"{path} is empty: it has no records.", field="data")
    examples: list[Example] = []
    formats: list[str] = []
    bad: list[DataError] = []
    unused = Counter[str]()
    for record in records:
        if isinstance(record, DataError):
            bad.append(record)
            continue
        try:
            formats.append(_format(record, format, formats))
            examples.append(FORMATS[formats[-1]].convert(record))
        except DataError as error:
            if error.field == "format" or not (formats or skip_bad):
                raise  # true of every record
            bad.append(error)
            continue
        unused.update(record.unused)
    if bad and not (skip_bad and examples):
        raise _joined(bad, len(records))
    _check_labels(str(path), examples)
    return Dataset(
        tuple(examples),
        "+".join(sorted({*formats})),
        str(path),
        digest,
        unused=dict(unused),
        skipped=tuple(error.message for error in bad),
    )


def _format(record: Record, name: str | None, before: Sequence[str]) -> str:
    """The first record's, as long as one fits it, or no other either: what is wrong is then told of that one."""
    if name is None and before:
        first = before[0]
        others = [other for other, layout in FORMATS.items() if layout.fits(record.columns)]
        return first if first in others or not others else others[0]
    return recognise(record, name)


def _joined(bad: Sequence[DataError], records: int) -> DataError:
    if len(bad) == 1:
        return bad[0]
    lines = [error.message for error in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"and {len(bad) - _SHOWN} more.")
    head = f"{len(bad)} of {records} records cannot be used (--skip-bad leaves them out):"
    return DataError("\n".join([head, *lines]), field=bad[0].field)


def read_datasets(paths: Sequence[Path], *, format: str | None = None, skip_bad: bool = False) -> Dataset:
    """Read several files as one data set. A record without a task of its own has its file's name for a task.

    `format` and `source` of the result join those of the files. Raises DataError.
    """
    parts = [read_dataset(path, format=format, skip_bad=skip_bad) for path in paths]
    if len(parts) == 1:
        return parts[0]
    if len({path.stem for path in paths}) < len(paths):
        raise DataError("Each file is a task, named as the file is, so the names must differ.", field="data")
    examples: list[Example] = []
    for path, part in zip(paths, parts, strict=True):
        examples += [replace(example, task=example.task or path.stem) for example in part.examples]
    return Dataset(
        tuple(examples),
        format="+".join(sorted({part.format for part in parts})),
        source=", ".join(part.source for part in parts),
        digest=_joint_digest([part.digest for part in parts]),
        unused=dict(sum((Counter(part.unused) for part in parts), Counter())),
        skipped=tuple(chain.from_iterable(part.skipped for part in parts)),
    )


def _records(path: Path) -> tuple[list[Record | DataError], str]:
    try:
        files = _saved_files(path) if path.is_dir() else [path]
        contents = [file.read_bytes() for file in files]
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", field="data") from error
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    digest = digests[0] if len(digests) == 1 else _joint_digest(digests)
    if files[0].suffix in _TABLES:
        return [*read_table_records(str(path), files)], digest
    records = [read_text_records(file, content) for file, content in zip(files, contents, strict=True)]
    return list(chain.from_iterable(records)), digest


def _joint_digest(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _saved_files(folder: Path) -> list[Path]:
    """The data files of a folder that `datasets.save_to_disk` wrote, or that holds the files of one split."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise DataError(f"{folder} holds several splits: name one of its folders ({splits}).", field="data")
    if (folder / "state.json").is_file():
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / Path(file["filename"]).name for file in state["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder}/state.json is not what datasets writes: {error!r}.", field="data") from error
    for suffix in (*_TABLES, ".jsonl", ".json", ".csv"):
        files = sorted(path for path in folder.glob(f"*{suffix}") if path.name != "dataset_info.json")
        # Shards are named as in train-00000-of-00002.
        if len({path.stem.split("-")[0] for path in files}) > 1:
            names = ", ".join(path.name for path in files[:6])
            raise DataError(f"{folder} holds several data sets: name one of its files ({names}).", field="data")
        if files:
            return files
    raise DataError(f"{folder} holds no data: no .parquet, .arrow, .jsonl, .json or .csv file.", field="data")


def _check_labels(source: str, examples: Sequence[Example]) -> None:
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for example in examples:
        labels[example.task].update(example.tags if example.label is None else [example.label])
    for task, found in sorted(labels.items()):
        if len(found) == 1:
            where = f"{source}, task {task!r}" if task else source
            raise DataError(f"{where}: all labels are {found.pop()!r}: there is nothing to learn.", field="data")
