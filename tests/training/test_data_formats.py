"""Each format by its columns, and each way to get one wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_adapters.errors import DataError
from onebase_training.data import Example, Turn, read_dataset
from onebase_training.data.reading.formats import FORMATS, recognise
from onebase_training.data.reading.text_files import Record


def read(tmp_path: Path, *rows: Any, format: str | None = None) -> tuple[str, Example]:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_dataset(path, format=format)
    return data.format, data.examples[0]


ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CHAT = (Turn("user", "Q"), Turn("assistant", "A"))
SYSTEM = Turn("system", "S")
TAGGED = Example(1, words=("x", "y"), tags=("O", "B"))


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [ASKED, ANSWERED]}, "chat", Example(1, CHAT)),
        (
            {"messages": [{"role": "developer", "content": "S"}, ASKED, ANSWERED], "id": 7, "task": "t"},
            "chat",
            Example(1, (SYSTEM, *CHAT), task="t"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {**ANSWERED, "weight": 1}]},
            "chat",
            Example(1, CHAT),
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "sharegpt",
            Example(1, CHAT),
        ),
        ({"conversations": [ASKED, ANSWERED], "system": "S"}, "sharegpt", Example(1, (SYSTEM, *CHAT))),
        ({"instruction": "Q", "output": "A"}, "instruction", Example(1, CHAT)),
        ({"instruction": "Q", "input": "", "output": "A", "history": []}, "instruction", Example(1, CHAT)),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "A"]]},
            "instruction",
            Example(
                1,
                (SYSTEM, Turn("user", "q"), CHAT[1], Turn("user", "Q\n\nI"), CHAT[1]),
            ),
        ),
        ({"prompt": "", "completion": "A"}, "prompt-completion", Example(1, prompt="", completion="A")),
        ({"question": "Q", "answer": "A"}, "prompt-completion", Example(1, prompt="Q", completion="A")),
        (
            {"tokens": ["x", "y"], "ner_tags": ["O", "B"]},
            "tokens-tags",
            Example(1, words=("x", "y"), tags=("O", "B")),
        ),
        ({"words": "x y", "tags": "O B"}, "tokens-tags", TAGGED),
        # Dolly's, OpenOrca's, BoolQ's and QNLI's columns; TRL's messages; text to go on training on.
        (
            {"instruction": "Q", "context": "C", "response": "A"},
            "instruction",
            Example(1, (Turn("user", "Q\n\nC"), CHAT[1])),
        ),
        (
            {"system_prompt": "S", "question": "Q", "response": "A"},
            "prompt-completion",
            Example(1, (SYSTEM, *CHAT)),
        ),
        (
            {"question": "Q", "passage": "P", "answer": False},
            "prompt-completion",
            Example(1, prompt="P\n\nQ", completion="false"),
        ),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt-completion", Example(1, CHAT)),
        ({"messages": json.dumps([ASKED, ANSWERED])}, "chat", Example(1, CHAT)),
        ({"conversation": [ASKED, ANSWERED]}, "sharegpt", Example(1, CHAT)),
        ({"input": "Q", "output": "A"}, "prompt-completion", Example(1, prompt="Q", completion="A")),
        ({"query": "Q", "response": "A"}, "prompt-completion", Example(1, prompt="Q", completion="A")),
        ({"inputs": "Q", "targets": "A"}, "prompt-completion", Example(1, prompt="Q", completion="A")),
        ({"text": "A"}, "text", Example(1, prompt="", completion="A", document=True)),
        (
            {"messages": [ASKED, {**ANSWERED, "weight": 0}, ASKED, {**ANSWERED, "train": True}]},
            "chat",
            Example(1, (CHAT[0], Turn("assistant", "A", learned=False), *CHAT)),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q", "loss": None},
                    {"from": "gpt", "value": "A", "loss": True},
                ]
            },
            "sharegpt",
            Example(1, CHAT),
        ),
    ],
)
def test_formats_are_recognised(tmp_path: Path, row: Any, format: str, expected: Example) -> None:
    assert read(tmp_path, row) == (format, expected)


@pytest.mark.parametrize("label", ["pos", 1, True])
def test_labels_are_names(tmp_path: Path, label: Any) -> None:
    other = {"sentence": "b", "label": "other"}
    assert read(tmp_path, {"text": "a", "label": label}, {"text": "b", "label": "other"}) == (
        "text-label",
        Example(1, prompt="a", label=str(label)),
    )
    assert read(tmp_path, {**other, "sentence": "a"}, {**other, "label": 0})[1].prompt == "a"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no format has these columns: none. The formats are chat"),
        ({"chosen": "a", "rejected": "b"}, r"preferences \(chosen, rejected\) cannot be learned"),
        ({"prompt": "a", "answer": "b", "response": "c"}, "response, answer mean the same"),
        ({"messages": []}, "messages must be a list with something in it"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, found str"),
        ({"messages": [ASKED]}, "no turn of the assistant answers another"),
        ({"messages": [ANSWERED, ASKED]}, "no turn of the assistant answers another"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, "a turn of the assistant is empty"),
        ({"messages": [{"role": "critic", "content": "x"}, ANSWERED]}, r"messages\[0\] has the role 'critic'"),
        ({"messages": [{"role": ["user"], "content": "x"}, ANSWERED]}, r"messages\[0\] has the role \['user'\]"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, r"messages\[1\].content is null"),
        ({"messages": [ASKED, {**ANSWERED, "tool_calls": [{}]}]}, "tool_calls must hold functions with a name"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "no turn of the assistant that is to be learned"),
        (
            {"messages": [ASKED, {**ANSWERED, "weight": 0.5}]},
            r"messages\[1\].weight is 0.5: a turn is learned \(1\)",
        ),
        ({"messages": "[{"}, "messages is text, but no list as JSON"),
        ({"messages": [{**ASKED, "content": [{"type": "image_url"}]}, ANSWERED]}, "not a part of the type 'text'"),
        ({"conversations": [{"from": "critic", "value": "x"}]}, "from 'critic', which is none of"),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            r"conversations\[0\].value is no call as JSON",
        ),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\].value is null"),
        ({"instruction": "Q", "output": ""}, "a turn of the assistant is empty"),
        ({"instruction": "Q", "output": "A", "history": [["q"]]}, "history must be a list of pairs"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt must be text, found list"),
        ({"prompt": "\ud83d", "completion": "b"}, "half of a surrogate pair"),
        ({"prompt": "a", "completion": "b", "task": 3}, "task must be text, found int"),
        ({"text": "a", "label": None}, "label is null"),
        ({"text": "a", "label": 0.5}, "label must be text, found float"),
        ({"text": "a", "label": " "}, "label holds an empty one"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 tokens, but 2 tags"),
        ({"tokens": [], "tags": []}, "tokens must be a list with something in it"),
        ({"tokens": ["a", ""], "tags": ["O", "B"]}, "tokens holds an empty one"),
    ],
)
def test_a_wrong_record_says_what_is_wrong(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"data.jsonl, line 1: .*{message}"):
        read(tmp_path, row)


def test_a_record_of_another_format_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: the column 'prompt' is missing \(found: 'txt', 'label'\)"):
        read(tmp_path, {"prompt": "a", "completion": "b"}, {"txt": "a", "label": "b"})


def test_a_format_can_be_named(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "text": "t", "label": "x"}
    assert read(tmp_path, row)[0] == "prompt-completion"
    assert read(tmp_path, row, {**row, "label": "y"}, format="text-label")[1] == Example(1, prompt="t", label="x")
    with pytest.raises(DataError, match="No format 'alpaca'; there are chat, "):
        read(tmp_path, row, format="alpaca")


def test_labels_that_are_all_the_same_teach_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all labels are 'x': there is nothing to learn"):
        read(tmp_path, {"text": "a", "label": "x"}, {"text": "b", "label": "x"})
    with pytest.raises(DataError, match="all labels are 'O'"):
        read(tmp_path, {"tokens": ["a", "b"], "tags": ["O", "O"]})
    with pytest.raises(DataError, match="task 'two': all labels are 'x'"):
        rows = [{"text": name, "label": name, "task": "one"} for name in "ab"]
        read(tmp_path, *rows, {"text": "b", "label": "x", "task": "two"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = """messages conversations instruction input output prompt completion text label tokens tags
    system history task role content from value weight"""
names = st.sampled_from(COLUMNS.split())
messages = st.lists(st.dictionaries(names, json_values | st.sampled_from(["user", "assistant", "gpt"]), max_size=4))


@given(st.dictionaries(names, json_values | messages, max_size=6), st.sampled_from([None, *FORMATS]))
def test_any_record_is_an_example_or_a_data_error(columns: dict[str, Any], format: str | None) -> None:
    record = Record("file", 3, columns)
    try:
        example = FORMATS[recognise(record, format)].convert(record)
    except DataError as error:
        assert error.message.startswith("file, line 3: ")
    else:
        assert example.line == 3
        answers = [turn.content for turn in example.turns if turn.role == "assistant"]
        assert any([answers, example.completion, example.label, example.tags])
        assert len(example.words) == len(example.tags)


def test_two_texts_are_classified_together(tmp_path: Path) -> None:
    rows = [{"question": "Q", "sentence": "S", "label": label} for label in (0, 1)]
    assert read(tmp_path, *rows)[1] == Example(1, prompt="Q\nS", label="0")


def test_calls_and_results_are_read(tmp_path: Path) -> None:
    function = {"name": "weather", "arguments": {"place": "Rome"}}
    openai = {
        "id": "c",
        "type": "function",
        "function": {**function, "arguments": json.dumps(function["arguments"])},
    }
    calls = [
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [openai]}]},
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": json.dumps(function)},
                {"from": "observation", "value": "12 C"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": json.dumps([{"name": "weather"}]),
        },
    ]
    for row in calls:
        example = read(tmp_path, row)[1]
        (call,) = example.turns[1].fields["tool_calls"]
        assert (call["type"], call["function"]) == ("function", function)
    assert example.turns[2] == Turn("tool", "12 C")
    assert example.tools == ({"type": "function", "function": {"name": "weather"}},)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "A", "id": 7, "empty": "", "source": {"url": "x"}}
    messages = {"messages": [{**ASKED, "mood": "glad"}, ANSWERED], "tools": [], "split": "train"}
    data = read_dataset(write(tmp_path / "d.jsonl", row, row, messages))
    assert data.format == "chat+prompt-completion"
    assert data.unused == {"id": 2, "source": 2, "messages[].mood": 1, "split": 1}


def test_bad_records_are_told_together_or_left_out(tmp_path: Path) -> None:
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}
    path = write(tmp_path / "d.jsonl", good, *[bad] * 30)
    path.write_text(path.read_text() + '{"prompt": "a"')
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    head, *lines = caught.value.message.splitlines()
    assert head == "31 of 32 records cannot be used (--skip-bad leaves them out):"
    assert (len(lines), lines[-1]) == (21, "and 11 more.")
    assert "line 21: completion is empty" in lines[-2]
    data = read_dataset(path, skip_bad=True)
    assert (len(data), len(data.skipped)) == (1, 31)
    with pytest.raises(DataError, match="30 of 30"):
        read_dataset(write(tmp_path / "all.jsonl", *[bad] * 30), skip_bad=True)
