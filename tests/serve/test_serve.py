"""`onebase serve` from outside: the stock client, adapters that come and go, signals, and wrong settings.

The tests of one server run in their order; the last one ends it.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.conftest import KEY, Served
from support.methods import CONFIGS, save_method
from support.models import save_lora
from support.servers import ServeProcess, gone

ADMIN = {"authorization": f"Bearer {KEY}"}
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def adapters(server: Served, tiny_model: Callable[[str], Path]) -> list[str]:
    """Two, registered while the server runs."""
    names = ["one", "two"]
    for seed, name in enumerate(names):
        save_lora(server.root / name, tiny_model("llama"), rank=4 + seed, seed=seed)
        reply = httpx.post(f"{server.url}/v1/adapters", json={"name": name, "path": name}, headers=ADMIN)
        assert reply.status_code == 201, reply.text
    return names


def test_says_what_was_loaded_and_where_to_call(server: Served) -> None:
    text = server.process.text
    assert "tiny: NF4 with double quantisation, on cpu" in text
    assert "KV cache 10 MiB" in text
    assert f"{server.url}/v1" in text
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert [process.name() for process in server.process.children()], "no engine process"


def test_the_stock_client_lists_and_calls_the_base_and_adapters_at_once(
    server: Served, adapters: list[str], tiny_model: Callable[[str], Path]
) -> None:
    client = server.client
    assert {model.id for model in client.models.list()} == {"tiny", *adapters}

    def complete(model: str) -> str:
        made = client.completions.create(model=model, prompt="Hello there", max_tokens=12, **GREEDY)
        assert made.choices[0].finish_reason == "length"
        return made.choices[0].text

    def stream(model: str) -> str:
        chunks = client.completions.create(model=model, prompt="Hello there", max_tokens=12, stream=True, **GREEDY)
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    models = ["tiny", *adapters]
    alone = [complete(model) for model in models]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(complete, models)) == alone
        assert list(pool.map(stream, models)) == alone


def test_chat(server: Served, adapters: list[str]) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    made = server.client.chat.completions.create(model="one", messages=messages, max_completion_tokens=5, **GREEDY)
    assert made.usage is not None
    assert made.usage.completion_tokens == 5
    with pytest.raises(openai.NotFoundError, match=r"tiny"):
        server.client.chat.completions.create(model="absent", messages=messages)


def test_more_than_the_queue_holds_get_429_and_the_others_their_answer(server: Served) -> None:
    client = server.client

    def complete(index: int) -> int:
        try:
            made = client.completions.create(model="tiny", prompt=f"{index} is", max_tokens=150, **GREEDY)
        except openai.RateLimitError as error:
            assert int(error.response.headers["retry-after"]) >= 1
            return 0
        assert made.usage is not None
        return made.usage.completion_tokens

    with ThreadPoolExecutor(24) as pool:
        counts = list(pool.map(complete, range(24)))
    assert set(counts) == {0, 150}
    assert counts.count(150) >= 8


def test_a_client_that_hangs_up_frees_the_engine(server: Served) -> None:
    for stream in (True, False):
        body = {"model": "tiny", "prompt": "on and on", "max_tokens": 200, "ignore_eos": True, "stream": stream}
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(content)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            if stream:
                connection.recv(100)
    assert eventually(lambda: engine(server)["running"] + engine(server)["blocks_used"] == 0)


def engine(server: Served) -> dict[str, Any]:
    """Its last snapshot."""
    found: dict[str, Any] = httpx.get(f"{server.url}/health").json()["engine"]
    return found


def eventually(happened: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_engine_that_is_killed_is_replaced_while_the_server_stays(server: Served, adapters: list[str]) -> None:
    client = server.client
    before = client.completions.create(model="one", prompt="Hello there", max_tokens=8, **GREEDY)
    errors: list[Exception] = []

    def run() -> None:
        try:
            while True:  # it may be done before the kill
                stream = client.completions.create(model="one", prompt="x", max_tokens=200, stream=True, **GREEDY)
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                assert reasons[-1] == "length", "a stream that was cut off looked like one that was done"
        except openai.APIError as error:
            errors.append(error)

    streams = [threading.Thread(target=run) for _ in range(3)]
    for thread in streams:
        thread.start()
    assert eventually(lambda: engine(server)["running"] > 0)
    (child,) = server.process.children()
    child.kill()
    for thread in streams:
        thread.join(20)
    assert len(errors) == 3
    assert httpx.get(f"{server.url}/health").status_code == 503
    refused = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200, 60)
    after = client.completions.create(model="one", prompt="Hello there", max_tokens=8, **GREEDY)
    assert after.choices[0].text == before.choices[0].text


def test_sigterm_finishes_what_runs(server: Served) -> None:
    client, children = server.client, server.process.children()
    stream = client.completions.create(model="tiny", prompt="on and on", max_tokens=230, stream=True, **GREEDY)
    next(iter(stream))
    os.kill(server.process.popen.pid, signal.SIGTERM)
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == "length"
    assert server.process.end() == 0
    assert gone(children)
    assert "finishing what is in flight" in server.process.text
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_second_ctrl_c_ends_it_at_once(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    process = ServeProcess(
        "--model", model, "--port", "0", "--device", "cpu", "--max-running", "1", home=tmp_path
    )  # fmt: skip
    try:
        url = process.wait_until_ready()
        children = process.children()
        body = {"model": "llama", "prompt": "on", "max_tokens": 240, "n": 64, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)]
            process.wait_for(lambda: httpx.get(f"{url}/health").json()["engine"]["running"])
            process.signal(signal.SIGINT)
            process.wait_for(lambda: "once more to stop at once" in process.text)
            began = time.monotonic()
            process.signal(signal.SIGINT)
            assert process.end(10) == 130
            assert time.monotonic() - began < 8
            assert pending[0].exception() is not None or pending[0].result().status_code >= 500
        assert gone(children, 5)
    finally:
        process.kill()


def test_no_engine_outlives_its_server(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Not even if the server is killed while the engine still loads."""
    process = ServeProcess("--model", tiny_model("llama"), "--port", "0", "--device", "cpu", home=tmp_path)
    try:
        process.wait_for(lambda: process.children())
        children = process.children()
        process.popen.kill()
        process.end()
        assert gone(children, 20)
    finally:
        process.kill()


def test_a_port_in_use_is_said_before_anything_is_loaded(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = ServeProcess("--model", tiny_model("llama"), "--port", str(port), home=tmp_path)
        assert process.end() == 1
    assert f"127.0.0.1:{port}" in process.text
    assert "--port" in process.text
    assert "loading" not in process.text


def test_no_such_model_is_said_in_one_line(tmp_path: Path) -> None:
    process = ServeProcess("--model", "no-such-model", "--port", "0", home=tmp_path)
    assert process.end() == 1
    (line,) = process.lines
    assert "No base model 'no-such-model'" in line


def test_both_processes_log_json_and_name_their_requests(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = tmp_path / "adapters"
    process = ServeProcess(
        "--model", tiny_model("llama"), "--served-name", "tiny", "--port", str(port), "--adapter-root", root.parent,
        "--admin-key", KEY, "--cache-gib", "0.01", "--device", "cpu", "--log-json", "--log-level", "info",
        home=tmp_path / "home",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    try:
        process.wait_for(ready)
        for seed in (1, 2):
            save_method(root / str(seed), tiny_model("llama"), CONFIGS["prompt-tuning"](), seed=seed)
            body = {"name": f"soft-{seed}", "path": f"adapters/{seed}"}
            assert httpx.post(f"{url}/v1/adapters", json=body, headers=ADMIN).status_code == 201
        body = {"prompt": "Hello", "adapters": [{"name": "soft-1"}, {"name": "soft-2"}]}
        reply = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": "mine"})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "adapters")
        process.signal(signal.SIGTERM)
        assert process.end() == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in process.lines]
    (api,) = [line for line in lines if line.get("request_id") == "mine"]
    (engine,) = [line for line in lines if line.get("process") == "engine" and "requests" in line]
    assert engine["requests"] == [f"{api['id']}-0"]
    assert (engine["error"], api["error"], api["status"]) == ("composition", "composition", 400)
    assert engine["message"].startswith("a request failed: soft-1 and soft-2 do not compose")
    for line in lines:
        assert {"time", "level", "logger", "message"} <= line.keys()
