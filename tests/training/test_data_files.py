"""Every file format holds the same records; every broken file names the place where it breaks."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from onebase_adapters.errors import DataError
from onebase_training.data import Example, read_dataset, read_datasets

ROWS = [
    {"prompt": "Is it?", "completion": " yes"},
    {"prompt": '多行\n文本,"引号"', "completion": " 不; 是\t的"},
    {"prompt": "", "completion": "🙂"},
]


def as_jsonl(path: Path) -> Path:
    path.with_suffix(".jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    return path.with_suffix(".jsonl")


def as_json(path: Path) -> Path:
    path.with_suffix(".json").write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    return path.with_suffix(".json")


def as_json_lines_with_a_mark(path: Path) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    path.with_suffix(".json").write_bytes(text.encode("utf-8-sig"))
    return path.with_suffix(".json")


def as_csv(path: Path, suffix: str = ".csv", delimiter: str = ",") -> Path:
    with path.with_suffix(suffix).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["completion", "prompt"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.with_suffix(suffix)


def as_tsv(path: Path) -> Path:
    return as_csv(path, ".tsv", "\t")


def as_semicolons(path: Path) -> Path:
    return as_csv(path, ".csv", ";")


def as_parquet(path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_parquet_shards(path: Path) -> Path:
    path.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), path / "train-00000-of-00002.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), path / "train-00001-of-00002.parquet")
    return path


def as_saved_dataset(path: Path) -> Path:
    save(path, pyarrow.Table.from_pylist(ROWS))
    return path


def save(folder: Path, table: pyarrow.Table) -> None:
    """As `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize(
    "write",
    [
        as_jsonl,
        as_json,
        as_json_lines_with_a_mark,
        as_csv,
        as_tsv,
        as_semicolons,
        as_parquet,
        as_parquet_shards,
        as_saved_dataset,
    ],
)
def test_all_file_formats_hold_the_same(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    data = read_dataset(write(tmp_path / "data"))
    assert data.format == "prompt-completion"
    assert [(one.prompt, one.completion) for one in data.examples] == [tuple(row.values()) for row in ROWS]
    assert len(data.digest) == 64


@pytest.mark.parametrize(
    ("write", "lines"),
    [(as_jsonl, [1, 3, 5]), (as_json, [2, 6, 10]), (as_csv, [2, 3, 5]), (as_parquet_shards, [1, 2, 3])],
)
def test_records_know_their_lines(tmp_path: Path, write: Callable[[Path], Path], lines: list[int]) -> None:
    assert [one.line for one in read_dataset(write(tmp_path / "data")).examples] == lines


def test_class_numbers_become_names(tmp_path: Path) -> None:
    features = {
        "sentence": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    }
    rows = [{"sentence": "bad", "label": 0}, {"sentence": "good", "label": 1}]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    save(tmp_path / "saved", table)
    assert [one.label for one in read_dataset(tmp_path / "saved").examples] == ["neg", "pos"]

    tags = {"tags": {"feature": {"names": ["O", "B-LOC"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    table = pyarrow.Table.from_pylist([{"tokens": ["in", "Rome"], "tags": [0, 1]}])
    metadata = {"huggingface": json.dumps({"info": {"features": tags}})}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "tags.parquet")
    assert read_dataset(tmp_path / "tags.parquet").examples[0].tags == ("O", "B-LOC")

    unlabelled = pyarrow.Table.from_pylist([*rows, {"sentence": "?", "label": -1}])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(unlabelled.replace_schema_metadata(metadata), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="line 3: label is null"):
        read_dataset(tmp_path / "test.parquet")


def test_other_wrappings_hold_the_same(tmp_path: Path) -> None:
    lines = as_jsonl(tmp_path / "plain").read_bytes()
    wrapped = {"version": 1, "data": ROWS}
    pandas = {name: {str(at): row[name] for at, row in enumerate(ROWS)} for name in ROWS[0]}
    compressed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(compressed, "zstd") as stream:
        stream.write(lines)
    for name, content in {
        "d.jsonl.gz": gzip.compress(lines),
        "d.jsonl.zst": compressed.getvalue().to_pybytes(),
        "old.jsonl": b"\r".join(json.dumps(row).encode() for row in ROWS),
        "wrapped.json": json.dumps(wrapped, indent=1).encode(),
        "pandas.json": json.dumps(pandas).encode(),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert prompts(tmp_path / name) == [tuple(row.values()) for row in ROWS], name
    (tmp_path / "one.json").write_bytes(json.dumps(ROWS[0], indent=1).encode())
    assert prompts(tmp_path / "one.json") == [tuple(ROWS[0].values())]
    (tmp_path / "uneven.json").write_text('{"prompt": {"0": "a"}, "completion": {"1": "b"}}')
    with pytest.raises(DataError, match="its columns do not have the same rows"):
        read_dataset(tmp_path / "uneven.json")
    for name in ("d.jsonl.gz", "d.jsonl.zst"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
        with pytest.raises(DataError, match="cannot be decompressed"):
            read_dataset(tmp_path / name)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"prompt,completion\n{'a' * 200_000},b\n")
    assert prompts(tmp_path / "d.csv") == [("a" * 200_000, "b")]


GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.jsonl", b" \n\n", "is empty"),
        ("d.json", b"[]", "is empty"),
        ("d.csv", b"prompt,completion\n", "is empty"),
        (
            "d.jsonl",
            GOOD + b'{"prompt": "a", "compl',
            "line 2: the file ends in the middle of a record",
        ),
        ("d.jsonl", GOOD + b'{"prompt": "a"\n' + GOOD, "line 2: not JSON"),
        ("d.json", b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a', "line 3: .* half written"),
        ("d.json", b'[\n{"prompt": "a", "completion": "b"},\n', "line 3: .* half written"),
        ("d.json", b'[\n{"prompt": "a", "completion": "b"}', "line 2: .* half written .the array is not closed"),
        ("d.json", b'[{"prompt": "a", "completion": "b"}\n{}]', "line 1: expected ',' or ']'"),
        ("d.json", b'[{"prompt": "a", "completion": "b"}]\n[]', "line 1: something follows"),
        ("d.json", b"[1]", "line 1: expected an object, found int"),
        ("d.jsonl", GOOD + b"[1]\n", "line 2: expected an object, found list"),
        ("d.jsonl", b"[" * 100_000, "half written"),
        ("d.csv", b"prompt,completion\na,b\nc\n", "line 3: 1 fields, but the header names 2 columns"),
        ("d.csv", b"prompt,completion\na,b,c\n", "line 2: 3 fields, but the header names 2 columns"),
        ("d.csv", b'prompt,completion\na,"b\n', "line 2: not CSV: unexpected end of data"),
        ("d.csv", b"prompt,prompt\na,b\n", "line 1: two columns have the same name"),
        ("d.jsonl", GOOD + b'{"prompt": "\xe9"}\n', r"line 2: byte 47 \(0xe9\) is not UTF-8. Save"),
        ("d.jsonl", b"\xef\xbb\xbf" + GOOD + b"\xff\n", r"line 2: byte 38 \(0xff\) is not UTF-8. Save"),
        ("d.csv", "prompt,completion\n".encode("utf-16"), "line 1: byte 0 .* begins like UTF-16"),
        ("d.parquet", b"PAR1 but no more", "cannot be read as parquet"),
        ("d.txt", b"hello", "cannot tell what this is"),
        ("d.xlsx", b"PK", "cannot tell what this is"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / name)


def test_paths_that_hold_no_one_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_dataset(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="holds no data"):
        read_dataset(tmp_path)
    for split in ("train", "test"):
        save(tmp_path / "dict" / split, pyarrow.Table.from_pylist(ROWS))
        (tmp_path / f"{split}.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"several data sets: .* \(test.jsonl, train.jsonl\)"):
        read_dataset(tmp_path)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits: .* \(test, train\)"):
        read_dataset(tmp_path / "dict")
    (tmp_path / "dict" / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json is not what datasets writes"):
        read_dataset(tmp_path / "dict" / "test")


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path / "data")
    before = read_dataset(path).digest
    path.write_text(path.read_text() + "\n")
    assert read_dataset(path).digest != before


def test_several_files_are_several_tasks(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_bytes(GOOD + b'{"prompt": "a", "completion": "b", "task": "own"}\n')
    two.write_text("text,label\nx,1\ny,0\n")
    data = read_datasets([one, two])
    assert [example.task for example in data.examples] == ["one", "own", "two", "two"]
    assert data.format == "prompt-completion+text-label"
    assert data.labels == ("0", "1")
    with pytest.raises(DataError, match="names must differ"):
        read_datasets([one, one])
    assert read_datasets([two]) == read_dataset(two)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
rows = st.lists(st.fixed_dictionaries({"prompt": texts, "completion": texts.filter(bool)}), min_size=1, max_size=6)


def prompts(path: Path) -> list[tuple[str | None, str | None]]:
    return [(one.prompt, one.completion) for one in read_dataset(path).examples]


@given(rows, st.booleans(), st.sampled_from(["\n", "\r\n", "\n \n"]), st.sampled_from([None, 0, 2]))
def test_whatever_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, str]],
    ascii_only: bool,
    newline: str,
    indent: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    expected = [(row["prompt"], row["completion"]) for row in rows]
    lines = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (folder / "d.jsonl").write_bytes(lines.encode())
    assert prompts(folder / "d.jsonl") == expected
    (folder / "d.json").write_bytes(json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode())
    assert prompts(folder / "d.json") == expected
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt", "completion"], *expected])
    (folder / "d.csv").write_bytes(out.getvalue().encode())
    assert prompts(folder / "d.csv") == expected


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_data_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("d.jsonl", "d.json", "d.csv"):
        for prefix in (b"", GOOD, b"[", b'prompt,completion\n"'):
            (folder / name).write_bytes(prefix + content)
            try:
                data = read_dataset(folder / name)
            except DataError as error:
                assert str(folder / name) in error.message
            else:
                assert all(isinstance(one, Example) for one in data.examples)
