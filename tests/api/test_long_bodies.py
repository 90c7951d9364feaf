"""Long bodies are judged before work is done on them, and what takes a while holds nobody up."""

import threading
import time
from typing import Any

import httpx
import pytest

from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.schemas.body import MOST_TOKENS

LONG = "\t" * 400_000


def ticks_beside(work: threading.Thread) -> int:
    """How often this thread got to run while that one worked."""
    count = 0
    work.start()
    while work.is_alive():
        time.sleep(0.001)
        count += 1
    return count


def test_others_go_on_while_a_long_text_is_tokenised(codec: TextCodec) -> None:
    found: list[list[int]] = []
    text = "the quick brown fox " * 50_000
    before = time.perf_counter()
    ticks = ticks_beside(threading.Thread(target=lambda: found.append(codec.encode(text))))
    took = time.perf_counter() - before
    assert codec.decode(found[0]) == text
    assert ticks > took / 0.05  # holding the interpreter's lock, it would be one or two


def test_the_least_tokens_of_a_text(codec: TextCodec) -> None:
    for text in ("", "a", "the quick brown fox " * 20, "é" * 50, "<|im_start|>" * 9):
        assert codec.least_tokens(text) <= len(codec.encode(text))
    assert codec.least_tokens(LONG) > 4000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/embeddings", {"input": LONG}),
    ],
)
async def test_what_cannot_fit_is_not_tokenised(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(TextCodec, "encode", None)
    reply = await http.post(path, json=body)
    assert reply.json()["error"]["code"] == "context_length_exceeded", reply.text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": ["a"] * 1025}, "prompt"),
        ("/v1/completions", {"prompt": [5] * (MOST_TOKENS + 1)}, "prompt"),
        ("/v1/embeddings", {"input": [[5]] * 1025}, "input"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 10_001}, "messages"),
        ("/detokenize", {"tokens": [5] * (MOST_TOKENS + 1)}, "tokens"),
    ],
)
async def test_too_many_items(http: httpx.AsyncClient, path: str, body: dict[str, Any], field: str) -> None:
    reply = await http.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


async def test_long_texts_to_tokens_and_back(http: httpx.AsyncClient, codec: TextCodec) -> None:
    """Which fit into no context, and are counted all the same."""
    text = "the quick brown fox " * 2000
    found = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert found["tokens"] == codec.encode(text)
    assert "".join(found["token_strs"]) == text
    assert (await http.post("/detokenize", json={"tokens": found["tokens"]})).json() == {"prompt": text}
