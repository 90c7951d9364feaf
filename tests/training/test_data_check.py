"""Everything that the check is to find, in data that has it; and what a person sees of it."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from onebase.cli import data as data_cli
from onebase.cli.terminal.data_view import show, token_texts
from onebase_adapters.errors import DataError
from onebase_training.data import Dataset, Example, Turn, data_check
from onebase_training.data.data_check import Check, TooLong, describe
from onebase_training.data.encoding.encode import encode_whole

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}<assistant>"


def check(data: Dataset, tokenizer: Any, **options: Any) -> Check:
    return data_check.check(data, encode_whole(data.examples, tokenizer), **options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", chat_template=TEMPLATE)


def dataset(*examples: Example, format: str = "prompt-completion") -> Dataset:
    return Dataset(examples, format, "here.jsonl", "0" * 64)


def pair(line: int, prompt: str, completion: str) -> Example:
    return Example(line, prompt=prompt, completion=completion)


def test_lengths_and_what_does_not_fit(tokenizer: Any) -> None:
    data = dataset(pair(1, "ab", "c"), pair(3, "abcd", "efghij"), pair(4, "a" * 12, "b"))
    found = check(data, tokenizer, max_length=10)
    assert found.lengths == (4, 11, 14)
    assert found.learned == 2 + 7 + 2
    assert found.too_long == (TooLong(3, 11, 4), TooLong(4, 14, 12))


def test_duplicates_conflicts_and_leaks(tokenizer: Any) -> None:
    data = dataset(
        pair(1, "What is it?", "a"),
        pair(2, "what is it", "a"),
        pair(3, "Who is there?", "b"),
        pair(4, "Who is there?", "c"),
        pair(5, "Something of its own", "d"),
    )
    held_out = dataset(pair(1, "WHO IS THERE", "b"), pair(2, "Another thing", "a"))
    found = check(data, tokenizer, max_length=99, held_out=held_out)
    assert found.duplicates == ((1, 2), (3, 4))
    assert found.conflicts == ((3, 4),)
    assert found.leaks == ((1, 3),)
    assert check(data, tokenizer, max_length=99).leaks == ()


def test_examples_without_a_prompt_are_compared_by_their_text(tokenizer: Any) -> None:
    data = dataset(pair(1, "", "one text"), pair(2, "", "another one"), pair(3, "", "One text!"))
    found = check(data, tokenizer, max_length=99)
    assert found.duplicates == ((1, 3),)
    assert found.conflicts == ()


def test_labels_are_counted(tokenizer: Any) -> None:
    labelled = [Example(line, prompt=f"text {line}", label="ab"[line % 3 == 0]) for line in range(6)]
    assert check(dataset(*labelled), tokenizer, max_length=99).labels == {"a": 4, "b": 2}
    tagged = dataset(Example(1, words=("x", "y", "z"), tags=("O", "LOC", "O")))
    assert check(tagged, tokenizer, max_length=99).labels == {"O": 2, "LOC": 1}
    words = dataset(*(pair(line, f"text {line}", (" yes", " no")[line % 2]) for line in range(20)))
    assert check(words, tokenizer, max_length=99).labels == {"yes": 10, "no": 10}
    assert check(dataset(pair(1, "a", "b"), pair(2, "c", "d")), tokenizer, max_length=99).labels == {}


def test_labels_that_differ_in_writing_alone_and_unused_columns_are_told(tokenizer: Any) -> None:
    labels = ["Yes", "yes ", "no", "ｎｏ", "maybe"]
    labelled = [Example(line, prompt=f"text {line}", label=label) for line, label in enumerate(labels)]
    data = replace(dataset(*labelled), unused={"id": 2}, skipped=("line 9: text is null.",))
    found = check(data, tokenizer, max_length=99)
    assert found.spellings == (("Yes", "yes "), ("no", "ｎｏ"))
    text = shown(found, tokenizer)
    assert "! labels that differ only in spaces, case or Unicode form: 'Yes' and 'yes '; 'no' and 'ｎｏ'" in text
    assert "! the column 'id' is not used (something is in it in 2 records)" in text
    assert "! 1 record left out; the first: line 9: text is null." in text
    assert "columns that are not used: id" in describe(found)


def test_turns_that_answer_nothing_or_are_not_answered(tokenizer: Any) -> None:
    asked, answered = Turn("user", "a"), Turn("assistant", "b")
    chats = [(asked, answered), (asked, answered, asked), (answered, asked, answered)]
    data = dataset(*(Example(line, turns) for line, turns in enumerate(chats, 1)), format="chat")
    found = check(data, tokenizer, max_length=99)
    assert found.loose == (2, 3)
    assert found.learned == 3 * 2


def test_samples_are_spread_over_the_lengths(tokenizer: Any) -> None:
    data = dataset(*(pair(line, "a" * line, "b") for line in range(1, 31)))
    found = check(data, tokenizer, max_length=99, samples=3)
    assert [one.example.line for one in found.samples] == [6, 16, 26]
    assert check(data, tokenizer, max_length=99, samples=99).samples[29].example.line == 30


def shown(found: Check, tokenizer: Any, *, colour: bool = False) -> str:
    out = io.StringIO()
    system = "truecolor" if colour else None
    show(found, tokenizer, Console(file=out, width=200, force_terminal=colour, color_system=system))
    return out.getvalue()


def test_what_is_learned_is_coloured_and_what_is_read_is_not(tokenizer: Any) -> None:
    text = shown(check(dataset(pair(1, "[b]Q", "é\nA")), tokenizer, max_length=99), tokenizer, colour=True)
    coloured = [part for part in text.split("\x1b[") if part.startswith("30;48")]
    assert "".join(part.partition("m")[2] for part in coloured) == "é⏎A</s>"
    plain = [part.partition("m")[2] for part in text.split("\x1b[") if part.startswith("90m")]
    assert "".join(plain) == "[b]Q"  # not taken for rich's markup


def test_every_finding_is_told(tokenizer: Any) -> None:
    bad = check(
        dataset(
            *(pair(line, "Same?", "yes") for line in range(1, 40)),
            pair(40, "Same?", "no"),
            pair(41, "x" * 300, "yes"),
            Example(42, (Turn("user", "a"), Turn("assistant", "yes"), Turn("user", "c"))),
        ),
        tokenizer,
        max_length=50,
        held_out=dataset(pair(7, "same", "yes")),
    )
    text = shown(bad, tokenizer)
    for expected in (
        "here.jsonl: 42 examples, format prompt-completion; held out: here.jsonl, 1 example\n",
        "measured by macro_f1",
        "! 1 longer than 50 tokens (1 in the prompt alone)",
        "! 39 near-duplicate prompts in 1 group, the first in lines 1, 2,",
        "! the same prompt with different answers: 1 prompt, the first in lines 1, 2,",
        "! 1 held-out prompt nearly as in training, so the measurement would flatter; the first in line 7",
        "! the rarest label is 'no': 1 of 42",
        "! chats that begin with the assistant, or end with another (not learned): line 42",
        "yes ████████████████████████████████████ 41 (98%)",
    ):
        assert expected in text
    good = check(dataset(pair(1, "Q", "A"), pair(2, "q2", "B")), tokenizer, max_length=50, held_out=dataset())
    text = shown(good, tokenizer)
    assert "! " not in text
    assert text.count("✓ ") == 3


def test_long_samples_lose_their_middle(tokenizer: Any) -> None:
    text = shown(check(dataset(pair(1, "a" * 500, "b")), tokenizer, max_length=999), tokenizer)
    assert "a … 404 tokens … a" in text


def test_tokens_of_one_character_are_shown_together(tokenizer: Any) -> None:
    ids = tokenizer("a é 你🙂")["input_ids"]
    assert list(token_texts(ids, tokenizer)) == ["a", " ", "é", " ", "你", "🙂"]
    assert "".join(token_texts(ids[:-1], tokenizer)) == "a é 你\ufffd"


@pytest.mark.real
def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(9)))
    done = CliRunner().invoke(data_cli.app, ["check", str(path), "--samples", "1"])
    assert done.exit_code == 0, done.output
    assert "9 examples, format text-label" in " ".join(done.output.split())
    assert "Label: a<|im_end|>" in done.output or "Label: b<|im_end|>" in done.output
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no format has these columns: 'a'"):
        CliRunner().invoke(data_cli.app, ["check", str(path)], catch_exceptions=False)
