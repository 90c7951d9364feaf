"""CPU time of the API process per streamed token, with an engine that costs nothing.

    python -m benchmarks.http_overhead [--streams 32] [--tokens 64] [--step-ms 15] [--profile FILE]

Three processes, as in production: this one sends the requests, one serves the API with the real ProcessEngine, and
behind it a stand-in for the engine process answers every `step-ms` with one token for each request in flight.
"""

import argparse
import asyncio
import json
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from onebase_engine.base.base_spec import DEFAULT_BASE
from onebase_engine.base.catalog import fetch_base
from onebase_engine.engine_info import EngineInfo, EngineStats
from onebase_engine.request import Output
from onebase_server.engine_process.frames import frame, read_frame, read_frame_async
from onebase_server.engine_process.messages import (
    Command,
    Outputs,
    Ready,
    Submit,
    decode_command,
    decode_event,
    encode,
)
from onebase_server.engine_process.supervisor import ProcessEngine


def engine_process(descriptor: int, step_seconds: float) -> None:
    """The stand-in: random tokens on a fixed beat."""
    connection = socket.socket(fileno=descriptor)
    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def read() -> None:
        while (message := read_frame(connection)) is not None:
            inbox.put(decode_command(message))
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    info = EngineInfo("tiny", "f00d", "llama", "nf4", "cpu", 49152, 8192, 100_000, 0, 0, (2,), {})
    stats = EngineStats(*[0] * len(EngineStats.__struct_fields__))
    connection.sendall(frame(encode(Ready(info, stats))))
    left: dict[str, int] = {}
    chance = random.Random(1)
    beat = time.monotonic()
    while True:
        while not (left and inbox.empty()):
            command = inbox.get()
            if command is None:
                return
            if isinstance(command, Submit):
                left[command.request.id] = command.request.sampling.max_tokens
        beat = max(beat + step_seconds, time.monotonic())
        time.sleep(max(0.0, beat - time.monotonic()))
        outputs = []
        for request_id in list(left):
            left[request_id] -= 1
            ending = "length" if left[request_id] == 0 else None
            outputs.append(Output(request_id, (chance.randrange(20, 49000),), finish_reason=ending))
            if ending:
                del left[request_id]
        connection.sendall(frame(encode(Outputs(tuple(outputs), stats))))


class _StandIn(ProcessEngine):
    """The real client over the stand-in's process."""

    step_seconds = 0.015

    async def _launch(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.http_overhead"]
            command += ["--engine", str(theirs.fileno()), "--step-ms", str(self.step_seconds * 1000)]
            self._child = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        ready = decode_event(await read_frame_async(reader) or b"")
        if not isinstance(ready, Ready):
            raise RuntimeError("the stand-in did not start")
        self._info, self._accepting = ready.info, True
        return reader


async def _serve(port: int, step_seconds: float) -> None:
    from onebase_adapters.store.adapter_store import AdapterStore
    from onebase_engine.engine_config import EngineConfig
    from onebase_engine.text.tokenizer import load_codec
    from onebase_server.api.app import create_app
    from onebase_server.api.services import ApiSettings, Services
    from onebase_server.serving import _Server, _uvicorn_config, claim_port

    engine = _StandIn(EngineConfig())
    engine.step_seconds = step_seconds
    await engine.start()
    with tempfile.TemporaryDirectory() as folder, claim_port("127.0.0.1", port) as listener:
        store = AdapterStore(Path(folder))
        services = Services.over(engine, load_codec(fetch_base(DEFAULT_BASE)), store, ApiSettings("tiny"))
        await _Server(_uvicorn_config(create_app(services))).serve(sockets=[listener])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _one_stream(port: int, tokens: int, requests: int, stream: bool) -> int:
    """Requests one after the other on one connection; returns how many tokens came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": "tiny", "prompt": "word " * 64, "max_tokens": tokens, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    head += "content-type: application/json\r\n"
    end = b"0\r\n\r\n" if stream else b'"cached_tokens":0}}}'
    count = 0
    for _ in range(requests):
        writer.write(head.encode() + b"\r\n" + body)
        seen = b""
        while not seen.endswith(end):
            block = await reader.read(1 << 16)
            if not block:
                raise RuntimeError(f"the server hung up: {seen[-300:]!r}")
            seen = (seen + block)[-200:]
        count += tokens
    writer.close()
    return count


async def _measure(arguments: argparse.Namespace) -> None:
    port = _free_port()
    command = [sys.executable, "-m", "benchmarks.http_overhead", "--serve", str(port)]
    command += ["--step-ms", str(arguments.step_ms)]
    if arguments.profile:
        command[1:1] = ["-m", "cProfile", "-o", arguments.profile]
    server = subprocess.Popen(command)
    process = psutil.Process(server.pid)
    try:
        while True:
            try:
                await _one_stream(port, 1, 1, True)
                break
            except ConnectionError:
                await asyncio.sleep(0.1)
        await asyncio.gather(*[_one_stream(port, 8, 1, True) for _ in range(arguments.streams)])
        for stream in (True, False):
            before, began = process.cpu_times(), time.monotonic()
            streams = [
                _one_stream(port, arguments.tokens, arguments.requests, stream) for _ in range(arguments.streams)
            ]
            count = sum(await asyncio.gather(*streams))
            after, took = process.cpu_times(), time.monotonic() - began
            user, system = after.user - before.user, after.system - before.system
            print(
                f"{'streamed' if stream else 'plain':9} {arguments.streams} at once, {count} tokens: "
                f"{(user + system) / count * 1e6:.1f} us of CPU a token "
                f"(user {user / count * 1e6:.1f}, system {system / count * 1e6:.1f}); "
                f"{count / took:.0f} tokens/s, memory {process.memory_info().rss >> 20} MiB"
            )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def main() -> None:
    """Run the measurement, or one of its two other processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="for each stream, one after the other")
    parser.add_argument("--step-ms", type=float, default=15.0)
    parser.add_argument("--profile", help="write the API process's cProfile here")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        engine_process(arguments.engine, arguments.step_ms / 1000)
    elif arguments.serve is not None:
        import uvloop

        with suppress(KeyboardInterrupt):
            uvloop.run(_serve(arguments.serve, arguments.step_ms / 1000))
    else:
        asyncio.run(_measure(arguments))


if __name__ == "__main__":
    main()
