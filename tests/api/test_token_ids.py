"""`return_token_ids`: the tokens of prompt and answer beside their text, whole and streamed."""

from typing import Any

import httpx
import pytest

from onebase_engine.text.tokenizer import TextCodec

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


async def test_of_a_chat(http: httpx.AsyncClient, events: Any, engine: Any, reply: Any, codec: TextCodec) -> None:
    answer = codec.encode("hello é")
    engine.reply = lambda request: reply(answer)
    body = {"messages": USER, "n": 2, "return_token_ids": True}
    document = (await http.post(CHAT, json=body)).json()
    assert document["prompt_token_ids"] == list(engine.requests[0].prompt)
    assert [choice["token_ids"] for choice in document["choices"]] == [answer, answer]
    chunks = await events(CHAT, **body)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [document["prompt_token_ids"]] + [None] * (
        len(chunks) - 1
    )
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [token for choice in own for token in choice["token_ids"]] == answer
    plain = (await http.post(CHAT, json={"messages": USER})).json()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


async def test_of_completions(
    http: httpx.AsyncClient, events: Any, engine: Any, reply: Any, codec: TextCodec
) -> None:
    answer = codec.encode("hello")
    engine.reply = lambda request: reply(answer)
    body = {"prompt": ["a", "b c"], "return_token_ids": True}
    choices = (await http.post(COMPLETIONS, json=body)).json()["choices"]
    prompts = [codec.encode("a"), codec.encode("b c")]
    assert [(choice["prompt_token_ids"], choice["token_ids"]) for choice in choices] == [
        (p, answer) for p in prompts
    ]
    chunks = await events(COMPLETIONS, **body)
    for index, prompt in enumerate(prompts):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice] == [prompt]
        assert [token for choice in own for token in choice["token_ids"]] == answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_without_what_a_stop_string_cut_off(
    http: httpx.AsyncClient, engine: Any, reply: Any, codec: TextCodec, path: str
) -> None:
    engine.reply = lambda request: reply(codec.encode("a\tb\tc"))
    body = {"messages": USER} if path == CHAT else {"prompt": "a"}
    (choice,) = (await http.post(path, json={**body, "stop": "\t", "return_token_ids": True})).json()["choices"]
    assert len(choice["token_ids"]) < len(codec.encode("a\tb\tc"))
