"""Adapters with text around the prompt, or turns in front of the conversation."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.services import Services

SYSTEM = {"role": "system", "content": "be brief"}
EXAMPLE = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(autouse=True)
async def adapters(services: Services, tmp_path: Path, new_adapter: Callable[..., Path]) -> None:
    """`framed` has all texts around a prompt, `ended` and `closed` end the answer, `tuned` has nothing."""
    template = {"before": "Q: ", "after": "\nA:", "messages": [SYSTEM, *EXAMPLE]}
    texts = {"framed": template} | {
        name: {"before": "", "after": "", "messages": [], "stop": stop}
        for name, stop in (("ended", ["\n"]), ("closed", ["\n", "."]))
    }
    configs = {name: {"template": text} for name, text in texts.items()} | {"tuned": {}}
    for name, config in configs.items():
        folder = new_adapter(tmp_path / name, name.encode(), **config)
        await services.adapters.register(name, lambda folder=folder: services.store.stage(folder))  # type: ignore[misc]


async def sent(http: httpx.AsyncClient, engine: Any, codec: TextCodec, path: str, **body: Any) -> str:
    """The prompt's text as the engine got it."""
    reply = await http.post(path, json={"model": "framed", "max_tokens": 5, **body})
    assert reply.status_code == 200, reply.text
    return codec.decode(engine.requests[-1].prompt)


async def test_prompts(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    path = "/v1/completions"
    assert await sent(http, engine, codec, path, prompt="why") == "Q: why\nA:"
    assert await sent(http, engine, codec, path, prompt=codec.encode("why")) == "Q: why\nA:"
    assert await sent(http, engine, codec, path, prompt="why", model="tuned") == "why"
    assert await sent(http, engine, codec, path, prompt="why", model="framed@1") == "Q: why\nA:"
    assert await sent(http, engine, codec, path, prompt="", model="framed") == "Q: \nA:"


async def test_an_echo_is_all_that_was_read(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    for prompt in ("why", codec.encode("why")):
        body = {"model": "framed", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
        (choice,) = (await http.post("/v1/completions", json=body)).json()["choices"]
        assert choice["text"] == "Q: why\nA:"
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


async def test_conversations(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    path = "/v1/chat/completions"
    question = {"role": "user", "content": "3+3"}

    def rendered(*turns: dict[str, str]) -> str:
        return codec.render_chat(turns)

    text = await sent(http, engine, codec, path, messages=[question])
    assert text == rendered(SYSTEM, *EXAMPLE, question)
    own = {"role": "developer", "content": "in French"}
    text = await sent(http, engine, codec, path, messages=[own, question])
    assert text == rendered({"role": "system", "content": "be brief\n\nin French"}, *EXAMPLE, question)
    text = await sent(http, engine, codec, path, messages=[question], model="tuned")
    assert text == rendered(question)


async def test_tokenize_shows_what_is_sent(http: httpx.AsyncClient, engine: Any, codec: TextCodec) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "why"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "3+3"}]}),
    ):
        await sent(http, engine, codec, path, **body)
        tokens = (await http.post("/tokenize", json={"model": "framed", **body})).json()["tokens"]
        assert tuple(tokens) == engine.requests[-1].prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "why"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "why"}]}),
    ],
)
async def test_a_template_ends_the_answer(
    http: httpx.AsyncClient,
    engine: Any,
    reply: Any,
    codec: TextCodec,
    events: Callable[..., Awaitable[list[dict[str, Any]]]],
    path: str,
    asked: dict[str, Any],
    stream: bool,
) -> None:
    engine.reply = lambda request: reply(codec.encode("no. It is\nnext; one"))

    async def answer(**body: Any) -> tuple[str, str | None, str | None]:
        chunks = (
            await events(path, **asked, **body)
            if stream
            else [(await http.post(path, json={**asked, **body})).json()]
        )
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        texts = [
            part.get("text") or (part.get("delta") or part.get("message") or {}).get("content") for part in parts
        ]
        return "".join(text or "" for text in texts), parts[-1]["finish_reason"], parts[-1].get("stop_reason")

    assert await answer(model="ended") == ("no. It is", "stop", "\n")
    assert await answer(model="ended", stop=["It"]) == ("no. ", "stop", "It")
    assert await answer(model="ended", stop="one") == ("no. It is", "stop", "\n")
    assert await answer(adapters=[{"name": "ended"}, {"name": "closed"}]) == ("no", "stop", ".")
    assert (await answer(model="tuned"))[0] == "no. It is\nnext; one"
