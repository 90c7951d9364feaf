"""Tools: how prompts tell of them, calls read off outputs however they are cut, and grammars that force them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.generation.tools import CallRules, ToolCall, ToolParser
from onebase_server.api.schemas.chat import ChatRequest, Tool
from onebase_server.api.services import ApiSettings, Services


@pytest.fixture(autouse=True)
def context(engine: Any) -> None:
    """The tools' text takes some."""
    engine.info = msgspec.structs.replace(engine.info, context=4000)


PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
OPEN = {
    "type": "function",
    "function": {"name": "open", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NAMED = {"type": "function", "function": {"name": "clock"}}
FREE = CallRules(forced=False, one=False)
TOOLS = [Tool.model_validate(tool) for tool in (WEATHER, CLOCK)]


def tagged(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def parsed(text: str, *cuts: int) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an output that comes in pieces."""
    parser = ToolParser(TOOLS, FREE)
    parts: list[str | ToolCall] = []
    at = 0
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        parts += parser.push(text[at:cut])
        at = cut
    parts += parser.finish()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert parser.calls == len(calls)
    shown = "".join(part for part in parts if isinstance(part, str))
    return shown, [(call.name, json.loads(call.arguments)) for call in calls]


PARIS = ("weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("Hello.", "Hello.", []),
        ("", "", []),
        ("  \n", "  \n", []),
        (tagged("clock"), "", [("clock", {})]),
        (tagged("weather", city="Paris"), "", [PARIS]),
        ("Let me see.\n" + tagged("weather", city="Paris"), "Let me see.", [PARIS]),
        (tagged("weather", city="Paris") + "\n" + tagged("clock") + "\n", "", [PARIS, ("clock", {})]),
        (tagged("clock") + " Done.", " Done.", [("clock", {})]),
        ('<tool_call>{"name":"clock","arguments":{}}</tool_call>', "", [("clock", {})]),
        ('<tool_call>\n{"name":"clock","arguments":{}}', "", [("clock", {})]),
        ('{"name": "weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
        ('{"name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        (' [{"name": "clock"}, {"name": "weather", "arguments": {"city": "Paris"}}] ', "", [("clock", {}), PARIS]),
        ('<tool_call>[{"name": "clock"}, {"name": "clock"}]</tool_call>', "", [("clock", {})] * 2),
        # What looks like a call and is none stays as it is.
        (tagged("unknown"), tagged("unknown"), []),
        ("<tool_call>broken</tool_call> x", "<tool_call>broken</tool_call> x", []),
        ('<tool_call>{"name": "clock"', '<tool_call>{"name": "clock"', []),
        ('{"name": "unknown"}', '{"name": "unknown"}', []),
        ('{"name": "clock", "arguments": [1]}', '{"name": "clock", "arguments": [1]}', []),
        ('{"a": 1} and more', '{"a": 1} and more', []),
        ('[{"name": "clock"}, {"name": "unknown"}]', '[{"name": "clock"}, {"name": "unknown"}]', []),
        ("a < b, <tool_", "a < b, <tool_", []),
        ("[" * 5000, "[" * 5000, []),
    ],
)
def test_calls_in_an_output(text: str, shown: str, calls: list[Any]) -> None:
    assert parsed(text) == (shown, calls)
    assert parsed(text, *range(0, len(text), 1 if len(text) < 500 else 100)) == (shown, calls)


pieces = st.sampled_from(
    [tagged("clock"), tagged("weather", city="é"), tagged("none"), "<tool_call>", "</tool_call>", *" \nx{<"]
)


@settings(max_examples=200)
@given(text=st.lists(pieces, max_size=6).map("".join), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_calls_do_not_depend_on_how_an_output_is_cut(text: str, cuts: list[int]) -> None:
    assert parsed(text, *cuts) == parsed(text)


def test_text_is_shown_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolParser(TOOLS, FREE)
    assert parser.push("Hello") == ["Hello"]
    assert parser.push(" <") == []
    assert parser.push("b>") == [" <b>"]
    assert parser.push("\n<tool_call>") == []
    assert parser.push('{"name": "clock"}') == []
    (call,) = parser.push("</tool_call>")
    assert isinstance(call, ToolCall)


async def chat(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post(PATH, json={"messages": USER, "tools": [WEATHER, CLOCK], **body})
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    return document


async def test_the_message(http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec) -> None:
    engine.reply = lambda request: reply(codec.encode("One moment.\n" + tagged("weather", city="北京")))
    (choice,) = (await chat(http))["choices"]
    (call,) = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "One moment.", "refusal": None}
    assert choice["finish_reason"] == "tool_calls"
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "北京"}'}}
    engine.reply = lambda request: reply(codec.encode(tagged("clock")))
    assert (await chat(http))["choices"][0]["message"]["content"] is None
    engine.reply = lambda request: reply(codec.encode("Just text."))
    (choice,) = (await chat(http))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Just text.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    # Without tools nothing is read as a call.
    engine.reply = lambda request: reply(codec.encode(tagged("clock")))
    for body in ({"tools": None}, {"tool_choice": "none"}, {"tools": []}):
        assert (await chat(http, **body))["choices"][0]["message"]["content"] == tagged("clock")


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_call_that_is_cut_off_is_not_shown(
    http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec, choice: str
) -> None:
    engine.reply = lambda request: reply(codec.encode(tagged("weather", city="Paris")))
    for tokens in (3, 12, 30):
        (answer,) = (await chat(http, max_tokens=tokens, tool_choice=choice))["choices"]
        assert answer["finish_reason"] == "length"
        assert answer["message"]["content"] == ""


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({"tool_choice": NAMED}, 1),
        ({"tool_choice": "required"}, 2),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 1),
        ({"parallel_tool_calls": False}, 1),
        ({}, 5),
    ],
)
@pytest.mark.parametrize("at_once", [1, 1000])
async def test_how_many_calls_end_an_answer(
    http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec, at_once: int, fields: Any, made: int
) -> None:
    """A model that goes round in circles: two calls, over and over."""
    engine.tokens_at_once = at_once
    text = "\n".join([tagged("clock"), tagged("weather", city="Rome"), *[tagged("clock")] * 3])
    engine.reply = lambda request: reply(codec.encode(text))
    (answer,) = (await chat(http, **fields))["choices"]
    assert len(answer["message"]["tool_calls"]) == made
    assert (answer["message"]["content"], answer["finish_reason"]) == (None, "tool_calls")


async def test_a_template_without_a_system_turn_is_told_in_the_first_of_the_users(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    for template in (
        refusing,
        "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }};{% endfor %}",
    ):
        plain = TextCodec(codec.tokenizer, template)
        async with in_process(Services.over(engine, plain, store, ApiSettings("tiny"))) as http:
            await chat(http, max_tokens=5)
            text = codec.decode(engine.requests[-1].prompt)
            assert text.startswith("user:You can call functions.")
            assert text.endswith("\n\nhi;")


async def test_arguments_of_earlier_calls_may_be_nothing(http: httpx.AsyncClient, engine: Any, codec: Any) -> None:
    for arguments in ("", None, " ", {}):
        call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
        turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        await chat(http, messages=[*USER, *turns], max_tokens=5)
        assert tagged("clock") in codec.decode(engine.requests[-1].prompt)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize(
    "text", ["Hi é.\n" + tagged("weather", city="北京") + tagged("clock"), tagged("clock"), "no"]
)
async def test_streamed(
    http: httpx.AsyncClient, events: Any, engine: Any, reply: Any, codec: TextCodec, at_once: int, text: str
) -> None:
    engine.reply = lambda request: reply(codec.encode(text))
    whole = (await chat(http, n=2))["choices"]
    engine.tokens_at_once = at_once
    chunks = await events(PATH, messages=USER, tools=[WEATHER, CLOCK], n=2)
    for index in range(2):
        deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [("role" in delta) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
        message = whole[index]["message"]
        assert ("".join(delta.get("content") or "" for delta in deltas) or None) == (message["content"] or None)
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in calls] == list(range(len(calls)))
        assert [call["function"] for call in calls] == [call["function"] for call in message.get("tool_calls", ())]
        last = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index][-1]
        assert last["finish_reason"] == whole[index]["finish_reason"]


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_the_stock_clients_loop(client: openai.OpenAI, engine: Any, reply: Any, codec: TextCodec) -> None:
    """Ask, be asked to call, answer with the call's result."""
    tools: Any = [WEATHER]
    messages: Any = [{"role": "user", "content": "weather in Paris?"}]
    engine.reply = lambda request: reply(codec.encode(tagged("weather", city="Paris")))
    made = client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    message = made.choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    engine.reply = lambda request: reply(codec.encode("It is sunny."))
    again = client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert again.choices[0].message.content == "It is sunny."
    engine.reply = lambda request: reply(codec.encode(tagged("weather", city="Paris")))
    with client.chat.completions.stream(model="tiny", messages=messages, tools=tools) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Paris"}


HISTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "noon"},
]


async def test_a_template_that_knows_no_tools_is_helped(
    http: httpx.AsyncClient, engine: Any, codec: TextCodec
) -> None:
    await chat(http, messages=HISTORY, max_tokens=5)
    text = codec.decode(engine.requests[-1].prompt)
    system, rest = text.split("<|im_end|>", 1)
    assert system.startswith("<|im_start|>system\nbe brief\n\nYou can call functions.")
    assert json.dumps(WEATHER["function"]["description"]) in system  # type: ignore[index]
    assert '{"type": "function", "function": {"name": "clock"}}' in system
    call = tagged("clock")
    assert rest == (
        "\n<|im_start|>user\nweather?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    await chat(http, messages=USER, tool_choice="none", max_tokens=5)
    assert "functions" not in codec.decode(engine.requests[-1].prompt)


KNOWING = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }} {% endfor %}]{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.city }}{% endfor %};"
    "{% endfor %}"
)


async def test_a_template_that_knows_tools_gets_them(
    engine: Any, codec: TextCodec, store: AdapterStore, in_process: Callable[..., httpx.AsyncClient]
) -> None:
    knowing = TextCodec(codec.tokenizer, KNOWING)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "sun"}]
    async with in_process(Services.over(engine, knowing, store, ApiSettings("tiny"))) as http:
        await chat(http, messages=[*USER, *turns], max_tokens=5)
        text = codec.decode(engine.requests[-1].prompt)
        assert text == "[weather clock ]user:hi;assistant:weatherRome;tool:sun;"
        await chat(http, tools=None, max_tokens=5)
        assert codec.decode(engine.requests[-1].prompt) == "user:hi;"


@pytest.fixture(scope="module")
def accepts(codec: TextCodec) -> Callable[[str | None, str], bool]:
    tokenizer = LLTokenizer(codec.tokenizer.to_str(), eos_token=2)

    def check(grammar: str | None, text: str) -> bool:
        assert grammar is not None
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = codec.encode(text)
        whole = matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens)
        return whole and matcher.is_accepting()

    return check


def exact(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "strict": True}}


ONE = tagged("weather", city="Rome")
FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"tool_choice": "required"}, [ONE, ONE + "\n" + tagged("clock")], ["text", tagged("none"), "x" + ONE]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [ONE], [ONE + "\n" + ONE]),
        ({"tool_choice": NAMED}, [tagged("clock")], [ONE, "text", tagged("clock", x=1), tagged("clock") * 2]),
        (
            {"tools": [OPEN], "tool_choice": "required"},
            [tagged("open", city="Rome")],
            [tagged("open", city="Rome", type="string")],
        ),
        (
            {"tools": [exact(WEATHER), CLOCK]},
            ["text", "", "a < b", "see:\n" + ONE, ONE + ONE + " done"],
            [tagged("weather", town="Rome"), "x" + tagged("none")],
        ),
        ({"parallel_tool_calls": False}, ["text", "", "a " + ONE], [ONE + ONE, ONE + "x"]),
        ({"response_format": FORMAT}, ["12", ONE], ["text", "12.5", "12" + ONE]),
        ({"response_format": FORMAT, "tool_choice": "required"}, [ONE], ["12"]),
    ],
)
async def test_grammars(
    http: httpx.AsyncClient, engine: Any, accepts: Any, fields: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    await chat(http, **fields)
    grammar = engine.requests[-1].sampling.grammar
    for text in good:
        assert accepts(grammar, text), text
    for text in bad:
        assert not accepts(grammar, text), text


def allowed(mode: str) -> dict[str, Any]:
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}}


async def test_some_of_the_tools(http: httpx.AsyncClient, engine: Any, accepts: Any, codec: TextCodec) -> None:
    await chat(http, **allowed("auto"))
    assert engine.requests[-1].sampling.grammar is None
    told = codec.decode(engine.requests[-1].prompt)
    assert "clock" in told
    assert "weather" not in told
    await chat(http, **allowed("required"))
    grammar = engine.requests[-1].sampling.grammar
    assert accepts(grammar, tagged("clock"))
    assert not accepts(grammar, ONE)
    unknown = {"type": "function", "function": {"name": "none"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"tools": [unknown]}}
    reply = await http.post(PATH, json={"messages": USER, "tools": [CLOCK], "tool_choice": choice})
    assert "tool_choice names 'none'; the tools are: clock." in reply.json()["error"]["message"]


async def test_some_of_a_responses_tools(http: httpx.AsyncClient, engine: Any, accepts: Any) -> None:
    tools = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    reply = await http.post("/v1/responses", json={"input": "hi", "tools": tools, "tool_choice": choice})
    assert reply.status_code == 200, reply.text
    assert reply.json()["tool_choice"] == choice
    assert not accepts(engine.requests[-1].sampling.grammar, ONE)


async def test_free_choice_needs_no_grammar(http: httpx.AsyncClient, engine: Any) -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": True}):
        await chat(http, **fields)
        assert engine.requests[-1].sampling.grammar is None
    await chat(http, tool_choice="none", response_format=FORMAT)
    assert engine.requests[-1].sampling.grammar is not None


async def test_what_a_grammar_cannot_hold_is_left_to_the_caller_unless_strict(
    http: httpx.AsyncClient, engine: Any, accepts: Any
) -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "not": {}}}}
    await chat(http, tools=[odd], tool_choice="required")
    assert accepts(engine.requests[-1].sampling.grammar, tagged("odd"))
    reply = await http.post(PATH, json={"messages": USER, "tools": [exact(odd)]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
    assert 'Unimplemented keys: ["not"]' in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        ({"tools": [CLOCK, CLOCK]}, "tools", "same name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": None, "tool_choice": NAMED}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice", "names 'clock'; the tools are: weather."),
        ({"tool_choice": "always"}, "tool_choice", "must be 'none'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"guided_regex": "a"}, "guided_regex", "does not go with tools"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
        (
            {"messages": [*USER, {"role": "user", "content": "a", "tool_call_id": 5}]},
            "messages[1].tool_call_id",
            "",
        ),
    ],
)
async def test_what_is_refused(
    http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str, message: str
) -> None:
    reply = await http.post(PATH, json={"messages": USER, "tools": [WEATHER, CLOCK], **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert message in error["message"]
    assert not engine.requests


def test_names_of_the_schema_are_openais() -> None:
    schema = ChatRequest.model_json_schema()
    assert {"tools", "tool_choice", "parallel_tool_calls", "response_format"} <= schema["properties"].keys()
