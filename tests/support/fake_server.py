"""The real API over a real socket, over the tests' stand-ins for engine and trainer, while a command runs."""

import asyncio
import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import uvicorn

from conftest import FAKE_TRAINER, FakeEngine, Reply, make_adapter
from onebase_adapters.store.adapter_store import AdapterStore
from onebase_engine.request import EngineRequest
from onebase_engine.text.tokenizer import TextCodec, load_codec
from onebase_server.api.app import create_app
from onebase_server.api.services import ApiSettings, Services
from onebase_server.jobs.job_store import JobBook
from onebase_server.jobs.runner import JobSettings
from support.tokenizer import save_tokenizer

KEY = "a-key"


def run_beside(*commands: Sequence[str]) -> int:
    """Run the commands against a server of their own: `{url}` in an argument is its address, and so are ONEBASE_URL
    and ONEBASE_TOKENIZER (a folder) in their environment. Returns the first exit status that is not 0."""
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("127.0.0.1", 0))
        return asyncio.run(_serve(Path(folder), listener, commands))


async def _serve(folder: Path, listener: socket.socket, commands: Sequence[Sequence[str]]) -> int:
    save_tokenizer(folder)
    codec = load_codec(folder)
    engine = FakeEngine(codec.tokenizer.get_vocab_size())
    engine.reply = lambda request: _reply(codec, request)
    settings = ApiSettings("tiny", adapter_root=folder, admin_key=KEY, api_keys=(KEY,))
    jobs = JobSettings("tiny", command=FAKE_TRAINER)
    with closing(AdapterStore(folder / "store")) as store, closing(JobBook(folder / "jobs")) as book:
        services = Services.over(engine, codec, store, settings, book=book, jobs=jobs)
        for name, config in {"plain": {}, "judge": {"head": {"kind": "sequence", "labels": ["no", "yes"]}}}.items():
            source = make_adapter(folder / name, name.encode(), **config)
            await services.adapters.register(name, lambda source=source: store.stage(source))  # type: ignore[misc]
        await services.runner.start()
        server = uvicorn.Server(
            uvicorn.Config(create_app(services), http="httptools", lifespan="off", log_level="error")
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        status = 0
        for command in commands:
            status = status or await asyncio.to_thread(_run, command, url, folder)
        server.should_exit = True
        await serving
        await services.runner.stop()
    return status


def _reply(codec: TextCodec, request: EngineRequest) -> Reply:
    """The prompt itself; or, where a grammar asks for a person or for the call that makes one, that."""
    grammar = request.sampling.grammar or ""
    if "tool_call" in grammar:
        text = '<tool_call>{"name": "person", "arguments": {"name": "Ann"}}</tool_call>'
        return Reply(codec.encode(text))
    return Reply(codec.encode('{"name": "Ann"}') if grammar else request.prompt)


def _run(command: Sequence[str], url: str, folder: Path) -> int:
    given = [argument.replace("{url}", url) for argument in command]
    own = {"ONEBASE_URL": url, "ONEBASE_KEY": KEY, "ONEBASE_TOKENIZER": str(folder)}
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(given, check=False, stdin=subprocess.DEVNULL, env={**without, **own}).returncode
