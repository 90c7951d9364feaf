"""POST /v1/responses: a chat in other words, plain and streamed, and the stock client's calls."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest

from onebase_engine.text.tokenizer import TextCodec

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'


@pytest.fixture(autouse=True)
def context(engine: Any) -> None:
    """The tools' text takes some."""
    engine.info = msgspec.structs.replace(engine.info, context=4000)


async def respond(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json={"input": "hi", **body})
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


async def streamed(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    reply = await http.post(PATH, json={"input": "hi", "stream": True, **body})
    assert reply.status_code == 200, reply.text
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = []
    for number, event in enumerate(events):
        kind, data = event.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {document['type']}"
        assert document["sequence_number"] == number
        found.append(document)
    return found


async def test_the_response(http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("hello é"))
    document = await respond(
        http, instructions="be brief", temperature=0.5, max_output_tokens=50, metadata={"a": "b"}
    )
    prompt = codec.encode(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(engine.requests[-1].prompt) == prompt
    sampling = engine.requests[-1].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 50)
    assert document["id"].startswith("resp_")
    (message,) = document["output"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "hello é", "annotations": [], "logprobs": []}],
    }
    tokens = len(codec.encode("hello é")) + 1
    assert document["usage"] == {
        "input_tokens": len(prompt),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(prompt) + tokens,
    }
    expected = {"object": "response", "status": "completed", "model": "tiny", "metadata": {"a": "b"}}
    assert expected.items() <= document.items()


async def test_cut_off(http: httpx.AsyncClient) -> None:
    document = await respond(http, max_output_tokens=2)
    assert (document["status"], document["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert document["output"][0]["status"] == "incomplete"
    assert (await streamed(http, max_output_tokens=2))[-1]["type"] == "response.incomplete"


async def test_logprobs(http: httpx.AsyncClient) -> None:
    for fields, top in (({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 2}, 2)):
        document = await respond(http, max_output_tokens=3, **fields)
        found = document["output"][0]["content"][0]["logprobs"]
        assert len(found) == 3
        assert len(found[0]["top_logprobs"]) == top
        deltas = [event for event in await streamed(http, max_output_tokens=3, **fields) if "delta" in event]
        assert [entry for event in deltas for entry in event["logprobs"]] == found


@pytest.mark.parametrize("at_once", [1, 4, 1000])
@pytest.mark.parametrize("text", ["hello 漢字", "", "Wait.\n" + CALL, CALL + CALL, CALL + " done"])
async def test_the_events_build_the_response(
    http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec, text: str, at_once: int
) -> None:
    engine.reply = lambda request: reply(codec.encode(text))
    engine.tokens_at_once = 1000
    plain = await respond(http, tools=[WEATHER])
    engine.tokens_at_once = at_once
    created, in_progress, *events, last = await streamed(http, tools=[WEATHER])
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"]["output"] == []
    assert created["response"]["status"] == "in_progress"
    assert last["type"] == "response.completed"

    items: dict[int, dict[str, Any]] = {}
    done = set()
    for event in events:
        kind, index = event["type"], event["output_index"]
        assert index not in done
        if kind == "response.output_item.added":
            assert index == len(items)
            items[index] = event["item"]
        elif kind == "response.output_item.done":
            done.add(index)
            expected = event["item"]
            if expected["type"] == "message":
                assert items[index]["text"] == expected["content"][0]["text"]
            else:
                assert items[index]["arguments"] == expected["arguments"]
        else:
            assert event["item_id"] == items[index]["id"]
            field = "text" if "text" in kind else "arguments"
            if kind.endswith(".delta"):
                items[index][field] = items[index].get(field, "") + event["delta"]
            elif kind == "response.content_part.added":
                items[index].setdefault("text", "")
            elif kind in ("response.output_text.done", "response.function_call_arguments.done"):
                assert items[index][field] == event[field]
    assert done == set(items)
    output = last["response"]["output"]
    assert [item["id"] for item in output] == [item["id"] for item in items.values()]

    def told(document: dict[str, Any]) -> Any:
        return sorted(
            [item["type"], item.get("name"), item.get("arguments"), (item.get("content") or [{}])[0].get("text")]
            for item in document["output"]
        )

    assert told(last["response"]) == told(plain)
    assert last["response"]["usage"] == plain["usage"]
    shown = "".join(item["content"][0]["text"] for item in plain["output"] if item["type"] == "message")
    assert shown == {"Wait.\n" + CALL: "Wait.", CALL + CALL: "", CALL + " done": " done"}.get(text, text)


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_the_stock_client(client: openai.OpenAI, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("hello 漢字"))
    made = client.responses.create(model="tiny", input="hi", instructions="be brief")
    assert made.output_text == "hello 漢字"
    assert made.usage is not None
    with client.responses.stream(model="tiny", input="hi", instructions="be brief") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "hello 漢字"
    assert final.usage == made.usage


def test_the_stock_clients_loop(client: openai.OpenAI, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode(CALL))
    turns: Any = [{"role": "user", "content": "weather?"}]
    tools: Any = [WEATHER]
    made = client.responses.create(model="tiny", input=turns, tools=tools)
    (call,) = made.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "北京"}
    turns += [item.model_dump(exclude_none=True) for item in made.output]
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    engine.reply = lambda request: reply(codec.encode("It is sunny."))
    made = client.responses.create(model="tiny", input=turns, tools=tools, tool_choice="auto")
    assert made.output_text == "It is sunny."
    assert f"{CALL}<|im_end|>" in codec.decode(engine.requests[-1].prompt)
    turns += [item.model_dump(exclude_none=True) for item in made.output]
    turns.append({"role": "user", "content": [{"type": "input_text", "text": "thanks"}]})
    client.responses.create(model="tiny", input=turns)
    assert codec.decode(engine.requests[-1].prompt).endswith(
        "It is sunny.<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_formats_and_forced_calls_become_grammars(http: httpx.AsyncClient, engine: Any) -> None:
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "integer"}, "strict": True}
    for fields in (
        {"text": {"format": schema}},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
    ):
        document = await respond(http, **fields)
        assert engine.requests[-1].sampling.grammar is not None
        if "text" in fields:
            assert document["text"] == fields["text"]
        else:
            assert document["tool_choice"] == fields["tool_choice"]
    await respond(http, tools=[WEATHER])
    assert engine.requests[-1].sampling.grammar is None


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "required"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": "\ud800"}, "input", "lone surrogate"),
        ({"input": 5}, "input", "valid list"),
        ({"input": [{"role": "user"}]}, "input[0]", "a message needs content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]", "a function_call needs call_id"),
        ({"input": [{"role": "user", "content": "a", "output": "b"}]}, "input[0]", "a message has no output"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "'function_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content", "input_image"),
        ({"input": "a " * 5000}, "input", "4000 tokens in all"),
        ({"input": "a", "max_output_tokens": 9000}, "input", "9000 for the completion"),
        ({"input": "a", "model": "nobody"}, "model", "does not exist"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id", "send the whole input"),
        ({"input": "a", "background": True}, "background", "is not supported"),
        ({"input": "a", "tools": [{"type": "web_search", "name": "w"}]}, "tools[0].type", "'function'"),
        ({"input": "a", "tools": [WEATHER, WEATHER]}, "tools", "same name"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
         "text.format.json_schema.schema", "Unimplemented"),
        ({"input": "a", "temperature": 200}, "temperature", "less than or equal"),
        ({"input": "a", "suffix": "b"}, "suffix", "Unknown field"),
    ],
)  # fmt: skip
async def test_what_is_refused(
    http: httpx.AsyncClient, engine: Any, body: dict[str, Any], param: str, message: str
) -> None:
    content = json.dumps(body)
    reply = await http.post(PATH, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 404), reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert not engine.requests


async def test_endings(http: httpx.AsyncClient, engine: Any, reply: Any) -> None:
    engine.reply = lambda request: reply([50, 51], finish_reason="error", error_kind="engine_died")
    answer = await http.post(PATH, json={"input": "a"})
    assert answer.status_code == 503
    answer = await http.post(PATH, json={"input": "a", "stream": True})
    last = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
    assert last["error"]["code"] == "engine_died"
    engine.reply = lambda request: reply([], finish_reason="error", error_kind="engine_died")
    answer = await http.post(PATH, json={"input": "a", "stream": True})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_errors_are_the_stock_clients(client: openai.OpenAI, engine: Any, reply: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="tiny", input="a", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    engine.reply = lambda request: reply([50, 51], finish_reason="error", error_kind="engine_died")
    with pytest.raises(openai.APIError, match=r"It broke\."):
        list(client.responses.create(model="tiny", input="a", stream=True))
