"""Fields that constrain the output: what they become, and that bad ones are refused by name.

That outputs follow their grammars is tested with the engine.
"""

import json
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from onebase_engine.text.tokenizer import TextCodec

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CHOICES = ["yes", 'no "q"', "a\nb", "漢字", "x/y'z\\"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer(codec: TextCodec) -> LLTokenizer:
    return LLTokenizer(codec.tokenizer.to_str(), eos_token=2)


def accepts(grammar: str, tokenizer: LLTokenizer, codec: TextCodec, text: str) -> bool:
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = codec.encode(text)
    return (
        matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, ['{}', '{"a": [1]}'], ["[]", '{"a":', "{} x"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
            ['{"name":"é","age":3}', '{"name": "é", "age": 3}', '{\n  "name": "é",\n  "age": 3\n}'],
            ['{"name": "é"}', '{"name": "é",\n\n"age": 3}', '{"name":  "é", "age": 3}'],
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}}, ["[1]", '"a"'], ["x"]),
        ({"guided_json": PERSON}, ['{"name":"a","age":1}'], ["{}"]),
        ({"guided_json": json.dumps(PERSON)}, ['{"name":"a","age":1}'], ["{}"]),
        ({"guided_regex": r"\d{3}-[a-z]+"}, ["123-abc"], ["12-abc", "123-"]),
        ({"guided_choice": CHOICES}, CHOICES, ["yesno", "ye"]),
        ({"guided_grammar": 'start: "a" start | "b"'}, ["b", "aab"], ["a"]),
        ({"response_format": {"type": "json_object", "schema": PERSON}}, ['{"name":"a","age":1}'], ["{}"]),
        ({"structured_outputs": {"json": PERSON}}, ['{"name":"a","age":1}'], ["{}"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["[]"]),
        ({"structured_outputs": {"regex": r"\d{3}-[a-z]+"}}, ["123-abc"], ["12-abc"]),
        ({"structured_outputs": {"choice": CHOICES}}, CHOICES, ["yesno"]),
        ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, ["b", "aab"], ["a"]),
    ],
)  # fmt: skip
async def test_what_is_asked_for_becomes_a_grammar(
    http: httpx.AsyncClient,
    engine: Any,
    codec: TextCodec,
    tokenizer: LLTokenizer,
    path: str,
    fields: dict[str, Any],
    good: list[str],
    bad: list[str],
) -> None:
    body = CHAT if "chat" in path else {"prompt": "a"}
    reply = await http.post(path, json={**body, **fields})
    assert reply.status_code == 200, reply.text
    grammar = engine.requests[-1].sampling.grammar
    for text in good:
        assert accepts(grammar, tokenizer, codec, text), text
    for text in bad:
        assert not accepts(grammar, tokenizer, codec, text), text


async def test_without_there_is_none(http: httpx.AsyncClient, engine: Any) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "guided_regex": None}):
        await http.post("/v1/completions", json={"prompt": "a", **fields})
        assert engine.requests[-1].sampling.grammar is None


def schema(given: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": given}}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": "json"}, "response_format", "valid dictionary or"),
        ({"response_format": {}}, "response_format.type", "required"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with type"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", "Unknown field"),
        (schema({"type": "strin"}), "response_format.json_schema.schema", "Invalid type: strin"),
        (schema({"$ref": "#"}), "response_format.json_schema.schema", "refers to nothing but itself"),
        (schema({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}},
                 "$defs": {"b": {"$ref": "#/$defs/c"}, "c": {"$ref": "#/$defs/b"}}}),
         "response_format.json_schema.schema", "refers to nothing but itself"),
        (schema({"type": "array", "uniqueItems": True}), "response_format.json_schema.schema", "uniqueItems"),
        (schema({"not": {}}), "response_format.json_schema.schema", 'Unimplemented keys: ["not"]'),
        (schema({"$ref": "http://x/y"}), "response_format.json_schema.schema", "cannot be followed"),
        (schema({"minLength": 5, "maxLength": 2, "type": "string"}), "response_format.json_schema.schema", "minL"),
        (schema([1]), "response_format.json_schema.schema", "valid dictionary"),
        ({"structured_outputs": {}}, "structured_outputs", "needs one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "cannot be followed"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "cannot both"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "Unknown field"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "goes with type"),
        ({"guided_json": "{"}, "guided_json", "is not a JSON schema"),
        ({"guided_json": "5"}, "guided_json", "is not a JSON schema"),
        ({"guided_json": 5}, "guided_json", "must be a JSON schema"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": 5}, "guided_regex", "valid string"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_choice": [""]}, "guided_choice[0]", "at least 1 character"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "unknown name"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex and guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "cannot both"),
    ],
)  # fmt: skip
async def test_what_cannot_be_followed_is_refused(
    http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert not engine.requests


async def test_what_a_schema_that_is_not_strict_leaves_to_the_caller(http: httpx.AsyncClient, engine: Any) -> None:
    odd = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
        "propertyNames": {"pattern": "a"},
        "additionalProperties": {"type": "string", "format": "password"},
    }
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": odd, "strict": False}}
    reply = await http.post("/v1/chat/completions", json={**CHAT, "response_format": form})
    assert reply.status_code == 200, reply.text
    assert {*reply.headers["x-onebase-ignored"].split(", ")} == {"uniqueItems", "propertyNames", "format"}
    assert engine.requests[-1].sampling.grammar is not None


async def test_a_large_schema_is_checked_too(http: httpx.AsyncClient, engine: Any) -> None:
    properties = {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,50}$"} for i in range(400)}
    body = {"prompt": "a", "guided_json": {"type": "object", "properties": properties}}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    properties["p9"]["pattern"] = "("
    reply = await http.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "guided_json")


async def test_a_failure_of_the_engines_is_a_400(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([], error_kind="grammar", finish_reason="error")
    answer = await http.post("/v1/completions", json={"prompt": "a", "guided_regex": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "grammar")


def test_the_stock_clients_parse(
    live: str, engine: Any, reply: Any, codec: TextCodec, tokenizer: LLTokenizer
) -> None:
    import openai

    class Person(BaseModel):
        name: str
        age: int

    text = '{"name":"Ann","age":30}'
    engine.reply = lambda request: reply(codec.encode(text))
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none") as client:
        made = client.chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "who"}], response_format=Person
        )
    assert made.choices[0].message.parsed == Person(name="Ann", age=30)
    assert accepts(engine.requests[-1].sampling.grammar, tokenizer, codec, text)
