"""schemathesis over the OpenAPI document: no 5xx, no answer that the document does not know. `make fuzz` runs it.

    python tests/fuzz_api.py PATH_OF_ST [more of `st run`'s options]

The API is the real one over a real socket; the engine behind it and the trainer are the tests' stand-ins.
"""

import asyncio
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import uvicorn

from conftest import FAKE_TRAINER, FakeEngine, make_adapter
from onebase_adapters.store import AdapterStore
from onebase_server.api.app import create_app
from onebase_server.api.services import ApiSettings, Services
from onebase_server.jobs.book import JobBook
from onebase_server.jobs.runner import JobSettings
from onebase_server.text.tokenizer import load_codec
from support.tokenizer import save_tokenizer

KEY = "fuzz"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "negative_data_rejection,unsupported_method,use_after_free"
)


async def serve(folder: Path, listener: socket.socket, command: list[str]) -> int:
    """Run the command against a server of its own."""
    save_tokenizer(folder)
    codec = load_codec(folder)
    engine = FakeEngine(codec.tokenizer.get_vocab_size())
    settings = ApiSettings("tiny", adapter_root=folder, admin_key=KEY, api_keys=(KEY,))
    jobs = JobSettings("tiny", command=FAKE_TRAINER)
    with closing(AdapterStore(folder / "store")) as store, closing(JobBook(folder / "jobs")) as book:
        services = Services.over(engine, codec, store, settings, book=book, jobs=jobs)
        heads = {"plain": {}, "judge": {"head": {"kind": "sequence", "labels": ["no", "yes"]}}}
        for name, config in heads.items():
            source = make_adapter(folder / name, name.encode(), **config)
            await services.adapters.register(name, lambda source=source: store.stage(source))  # type: ignore[misc]
        await services.runner.start()
        config = uvicorn.Config(create_app(services), http="httptools", lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        status = await asyncio.to_thread(lambda: subprocess.run(command, check=False).returncode)
        server.should_exit = True
        await serving
        await services.runner.stop()
    return status


def main() -> int:
    """Returns `st`'s exit status."""
    threading.current_thread().name = "fuzz"
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/openapi.json"
        command = [sys.argv[1], "run", url, "-H", f"authorization: Bearer {KEY}", "--checks", CHECKS]
        command += ["--continue-on-failure", "--wait-for-schema", "30", *sys.argv[2:]]
        return asyncio.run(serve(Path(folder), listener, command))


if __name__ == "__main__":
    sys.exit(main())
