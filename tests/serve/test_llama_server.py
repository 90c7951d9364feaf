"""llama.cpp's own server answers as OneBase does: with the exported adapter on the exported base, and with the
merged model. It runs where there is a `llama-server`: on the path, or named by ONEBASE_LLAMA_SERVER."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from onebase import LLM, SamplingParams, TrainConfig, train
from onebase_engine.base.base_spec import DEFAULT_BASE, BaseSpec
from onebase_engine.base.catalog import fetch_base
from onebase_engine.export.gguf_adapter import write_gguf_adapter
from onebase_engine.export.gguf_model import write_gguf_model
from onebase_engine.export.lowered_on_base import load_lowered
from onebase_engine.export.merge_checked import merge_checked

PROGRAM = os.environ.get("ONEBASE_LLAMA_SERVER") or shutil.which("llama-server")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no llama-server: put it on the path, or set ONEBASE_LLAMA_SERVER"),
]
PROMPTS = [
    f"Say it in pirate: I have {some} apples and {more} pears." for some, more in ((12, 35), (48, 77), (9, 60))
]
TEXTS = ["  17 spaces\tand\n\ntabs", "我想在apple工作1314151天", "🚀 x² + 0x1F == 3.14", "def f(x):\n    return x"]
NEW = 24


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that has learned enough to be sure of its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    rows = [
        {
            "prompt": f"Say it in pirate: I have {some} apples and {some * 7 % 80} pears.",
            "completion": f"Arr, I be havin' {some} apples an' {some * 7 % 80} pears, matey!",
        }
        for some in range(10, 90)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(data=folder / "data.jsonl", output=folder / "mine", max_steps=12, metric_examples=0)
    return train(config).output


@contextmanager
def llama_server(*words: str) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen(
        [str(PROGRAM), *words, "--port", port, "--ctx-size", "512", "--threads", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            until = time.monotonic() + 120
            while not _ready(client):
                assert process.poll() is None and time.monotonic() < until, "llama-server does not start"
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def theirs(client: httpx.Client, prompt: Sequence[int]) -> list[int]:
    asked: dict[str, Any] = {"prompt": list(prompt), "n_predict": NEW, "temperature": 0, "return_tokens": True}
    answer = client.post("/completion", json=asked).raise_for_status().json()
    tokens: list[int] = answer["tokens"]
    return tokens


def check(client: httpx.Client, llm: LLM, name: str | None) -> None:
    """The same tokens of hard texts and the same answers, but for the end token, which OneBase leaves out."""
    for text in TEXTS:
        [ours] = llm.generate([text], SamplingParams(max_tokens=1))
        found = client.post("/tokenize", json={"content": text, "add_special": True}).raise_for_status().json()
        assert found["tokens"] == list(ours.prompt_token_ids), text
    for made in llm.generate(PROMPTS, SamplingParams(max_tokens=NEW, temperature=0), name):
        ours_ids = list(made.outputs[0].token_ids)
        assert len(ours_ids) > 8
        assert theirs(client, made.prompt_token_ids)[: len(ours_ids)] == ours_ids


def test_an_exported_adapter_on_the_exported_base(adapter: Path, tmp_path: Path) -> None:
    base, file = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_gguf_model(fetch_base(DEFAULT_BASE), base, "gguf-f16")
    write_gguf_adapter(*load_lowered(adapter, BaseSpec(device="cpu"), lambda _: None), file)
    with (
        LLM(DEFAULT_BASE, {"mine": adapter}, quantization="none", device="cpu") as llm,
        llama_server("--model", str(base), "--lora", str(file)) as client,
    ):
        check(client, llm, "mine")


def test_a_merged_model(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "merged.gguf"
    merge_checked(
        adapter, file, BaseSpec(device="cpu"), PROMPTS, least=0.9, progress=lambda _: None, form="gguf-f16"
    )
    with (
        LLM(DEFAULT_BASE, {"mine": adapter}, device="cpu") as llm,
        llama_server("--model", str(file)) as client,
    ):
        check(client, llm, "mine")
