"""Outputs follow their grammars in a mixed batch, and what cannot be compiled ends its own request alone."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from onebase_engine import grammar as grammar_module
from support.tokenizer import EOS

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
NUMBER = LLMatcher.grammar_from_regex("[0-9]{3}-[a-f]{4}")
DRAWN = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 60}


@pytest.fixture(scope="module")
def decode(llama: Path) -> Callable[[Sequence[int]], str]:
    return Tokenizer.from_file(str(llama / "tokenizer.json")).decode


def test_every_output_follows_its_own_grammar(
    new_driver: Callable, loras: list[Path], decode: Callable[[Sequence[int]], str]
) -> None:
    driver = new_driver()
    for seed in range(8):
        adapter = loras[seed % 3] if seed % 2 else None
        driver.submit(f"json {seed}", [5, 6, 7], adapter, **DRAWN, seed=seed, grammar=JSON)
        driver.submit(f"regex {seed}", [8, 9], adapter, **DRAWN, seed=seed, top_p=0.9, grammar=NUMBER)
        driver.submit(f"free {seed}", [5, 6], adapter, **DRAWN, seed=seed)
    driver.submit("greedy", [5, 6, 7], grammar=JSON, ignore_eos=False, max_tokens=60)
    driver.run()
    for name, result in driver.results.items():
        assert result.ending.finish_reason in ("stop", "length"), result.ending.error
        text = decode(result.tokens)
        if name.startswith("regex"):
            assert re.fullmatch("[0-9]{3}-[a-f]{4}", text), text
            assert (result.ending.finish_reason, result.ending.stop_token) == ("stop", EOS)
        elif not name.startswith("free") and result.ending.finish_reason == "stop":
            found = json.loads(text)
            assert sorted(found) == ["age", "name"]
    assert sum(r.ending.finish_reason == "stop" for n, r in driver.results.items() if n.startswith("json")) >= 4


def test_a_grammar_changes_only_its_own_request(new_driver: Callable) -> None:
    outputs = []
    for company in ({}, {"grammar": NUMBER}):
        driver = new_driver()
        driver.submit("plain", [5, 6, 7], max_tokens=20)
        driver.submit("other", [8, 9], **DRAWN, seed=1, **company)
        driver.run()
        outputs.append(driver.results["plain"].tokens)
    assert outputs[0] == outputs[1]


def test_logprobs_are_those_of_the_model(new_driver: Callable, decode: Callable[[Sequence[int]], str]) -> None:
    driver = new_driver()
    result = driver.submit("a", [5, 6], **DRAWN, seed=1, grammar=NUMBER, logprobs=2)
    driver.run()
    assert len(result.logprobs) == len(result.tokens)
    assert any(entry.rank > 3 for entry in result.logprobs), "the mask should force unlikely tokens"


def test_the_end_waits_for_the_grammar_and_min_tokens_do_not_break_it(new_driver: Callable) -> None:
    driver = new_driver()
    short = LLMatcher.grammar_from_regex("a")
    result = driver.submit("a", [5, 6], **{**DRAWN, "min_tokens": 5, "max_tokens": 10}, grammar=short)
    ended = driver.submit("b", [5, 6], **DRAWN, grammar=short)
    driver.run()
    assert result.tokens[1:] == [EOS] * 4
    assert result.ending.finish_reason == "stop"
    assert len(ended.tokens) == 1


@pytest.mark.parametrize("bad", [LLMatcher.grammar_from_regex("(a"), "nonsense", ""])
def test_a_bad_grammar_ends_its_request_alone(new_driver: Callable, bad: str) -> None:
    driver = new_driver()
    driver.submit("good", [5, 6], **DRAWN, grammar=NUMBER)
    refused = driver.submit("bad", [5, 6], **DRAWN, grammar=bad)
    driver.run()
    assert (refused.ending.finish_reason, refused.ending.error_kind) == ("error", "grammar")
    assert "cannot be compiled" in refused.ending.error
    assert driver.results["good"].ending.finish_reason == "stop"


def test_a_grammar_that_takes_long_to_compile_holds_nobody_up(
    new_driver: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def slow(*arguments: Any, **options: Any) -> LLMatcher:
        gate.wait(30)
        return LLMatcher(*arguments, **options)

    monkeypatch.setattr(grammar_module, "LLMatcher", slow)
    driver = new_driver()
    waiting = driver.submit("slow", [5, 6], **DRAWN, grammar=NUMBER)
    dropped = driver.submit("dropped", [5, 6], **DRAWN, grammar=NUMBER)
    other = driver.submit("other", [5, 6], max_tokens=5)
    for _ in range(8):
        driver.step()
    assert len(other.tokens) == 5
    assert waiting.ending is None
    driver.engine.abort("dropped")
    del driver.results["dropped"]
    gate.set()
    driver.run()
    assert waiting.ending.finish_reason == "stop"
    assert dropped.tokens == []
