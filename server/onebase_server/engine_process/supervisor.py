"""The API's side of the engine process: starts it, talks to it, and starts it again when it dies.

Invariant: every request that was accepted ends exactly once. When the engine dies, all that were in flight
end with `engine_died`; until the next one is ready, new ones are refused with EngineUnavailableError.
"""

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec

from onebase_adapters import errors
from onebase_adapters.errors import AdapterFormatError, BaseModelError, OneBaseError
from onebase_engine.engine_config import EngineConfig
from onebase_engine.engine_info import AdapterInfo, EngineInfo, EngineStats
from onebase_engine.request import EngineRequest, Output
from onebase_server.engine_process.engine_client import EngineUnavailableError, QueueFullError
from onebase_server.engine_process.frames import frame, read_frame_async
from onebase_server.engine_process.messages import (
    Abort,
    AdapterLoaded,
    Command,
    CommandFailed,
    Done,
    Drain,
    Event,
    LoadAdapter,
    Outputs,
    Ready,
    StartFailed,
    Submit,
    UnloadAdapter,
    decode_event,
    encode,
)

log = logging.getLogger(__name__)

_RESTART_DELAYS = (0.0, 1.0, 5.0, 15.0, 30.0)
"""Seconds before each restart in a row; a run of a minute starts the row anew."""
_SPINS = "20000"
"""Turns (some 50 microseconds) for which the engine's OpenMP threads wait awake for work, unless the environment
says otherwise. libgomp's own number is many times that, and keeps cores from the API and its clients between
steps."""
_EMPTY_STATS = EngineStats(*[0] * len(EngineStats.__struct_fields__))


class _Inflight:
    """A request's outputs that its reader has not taken yet."""

    def __init__(self) -> None:
        self.pending: list[Output] = []
        self.arrived = asyncio.Event()

    def put(self, output: Output) -> None:
        self.pending.append(output)
        self.arrived.set()

    async def take(self) -> Output:
        """Wait for at least one output; those that piled up come as one."""
        await self.arrived.wait()
        self.arrived.clear()
        outputs, self.pending = self.pending, []
        return outputs[0] if len(outputs) == 1 else _merge(outputs)


def _merge(outputs: list[Output]) -> Output:
    first, last = outputs[0], outputs[-1]
    return Output(
        first.id,
        tokens=tuple(itertools.chain.from_iterable(o.tokens for o in outputs)),
        logprobs=tuple(itertools.chain.from_iterable(o.logprobs for o in outputs)),
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=first.cached_tokens,
        waited=first.waited,
        probabilities=last.probabilities,
        embedding=last.embedding,
        finish_reason=last.finish_reason,
        stop_token=last.stop_token,
        error=last.error,
        error_kind=last.error_kind,
    )


class ProcessEngine:
    """An EngineClient whose engine is a child process. Belongs to one event loop."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._info: EngineInfo | None = None
        self._stats = _EMPTY_STATS
        self._inflight: dict[str, _Inflight] = {}
        self._answers: dict[str, asyncio.Future[Event]] = {}
        self._folders: dict[str, str] = {}
        self._ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self._accepting = False

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineUnavailableError("The engine has not started yet.", retry_after=5)
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def ready(self) -> bool:
        return self._accepting

    @property
    def pid(self) -> int | None:
        """The engine process, while there is one."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it has loaded. Raises BaseModelError if it cannot."""
        reader = await self._launch()
        self._keeper = asyncio.create_task(self._keep(reader), name="engine-keeper")
        return self.info

    async def stop(self, grace: float = 30.0) -> None:
        """Take no more requests, give those in flight `grace` seconds, and end the process."""
        self._stopping = True
        self._accepting = False
        if self._child is None or self._keeper is None:
            return
        self._send(Drain(grace))
        try:
            async with asyncio.timeout(grace + 5.0):
                await asyncio.shield(self._keeper)
        except TimeoutError:
            self._child.kill()
            await self._keeper

    def kill(self) -> None:
        """End the process now; what is in flight ends as `engine_died`."""
        self._stopping = True
        if self._child is not None and self._child.returncode is None:
            self._child.kill()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Output, None]:
        """See EngineClient."""
        if not self._accepting:
            raise EngineUnavailableError("The engine is starting or stopping.", retry_after=5)
        if len(self._inflight) >= self._config.max_running + self._config.max_waiting:
            raise QueueFullError(f"{len(self._inflight)} requests are in flight already.", retry_after=1)
        inflight = self._inflight[request.id] = _Inflight()
        self._send(Submit(request))
        try:
            while True:
                output = await inflight.take()
                if output.finish_reason is not None:
                    self._inflight.pop(request.id, None)
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if self._inflight.pop(request.id, None) is not None:
                self._send(Abort(request.id))

    async def load_adapter(self, digest: str, folder: str) -> AdapterInfo:
        """See EngineClient."""
        command = LoadAdapter(self._next_id(), digest, folder)
        answer = await self._ask(command.id, command)
        if isinstance(answer, AdapterLoaded):
            self._folders[digest] = folder
            return answer.info
        if isinstance(answer, CommandFailed):
            raise _named_error(answer.kind)(answer.message, field=answer.field)
        raise AdapterFormatError(f"Unexpected answer from the engine: {answer}")

    async def unload_adapter(self, digest: str) -> None:
        """See EngineClient."""
        self._folders.pop(digest, None)
        command = UnloadAdapter(self._next_id(), digest)
        await self._ask(command.id, command)

    def _next_id(self) -> str:
        return f"command-{next(self._ids)}"

    async def _ask(self, command_id: str, command: Command) -> Event:
        if not self._accepting:
            raise EngineUnavailableError("The engine is starting or stopping.", retry_after=5)
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._answers[command_id] = answer
        self._send(command)
        try:
            return await answer
        finally:
            self._answers.pop(command_id, None)

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame(encode(command)))

    async def _launch(self) -> asyncio.StreamReader:
        """Start a process and wait for its Ready. Raises BaseModelError."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "onebase_server.engine_process.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # out of reach of Ctrl-C, also before it can ignore it
                stdin=asyncio.subprocess.DEVNULL,
                env={"GOMP_SPINCOUNT": _SPINS} | os.environ,
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=2**26)
        self._writer.write(frame(msgspec.json.encode(self._config)))
        try:
            message = await read_frame_async(reader)
        except asyncio.CancelledError:
            self._writer.close()
            self._child.kill()
            raise
        first = decode_event(message) if message is not None else None
        if not isinstance(first, Ready):
            self._writer.close()
            await self._child.wait()
            why = first.message if isinstance(first, StartFailed) else f"exit code {self._child.returncode}"
            raise BaseModelError(f"The engine did not start: {why}")
        self._info, self._stats = first.info, first.stats
        self._accepting = not self._stopping
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        """Read events; when the process ends without having been told to, start another."""
        deaths = 0
        while True:
            started = time.monotonic()
            await self._read_events(reader)
            self._accepting = False
            await self._bury()
            if self._stopping:
                return
            deaths = 0 if time.monotonic() - started > 60 else deaths + 1
            while True:
                delay = _RESTART_DELAYS[min(max(deaths - 1, 0), len(_RESTART_DELAYS) - 1)]
                log.error("the engine died; starting another in %.0f s", delay)
                await asyncio.sleep(delay)
                if self._stopping:
                    return
                try:
                    reader = await self._launch()
                    break
                except BaseModelError as error:
                    log.error("%s", error.message)
                    deaths += 1
            for digest, folder in self._folders.items():
                self._send(LoadAdapter(self._next_id(), digest, folder))

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        while (message := await read_frame_async(reader)) is not None:
            match decode_event(message):
                case Outputs(outputs, stats):
                    self._stats = stats
                    for output in outputs:
                        inflight = self._inflight.get(output.id)
                        if inflight is not None:
                            inflight.put(output)
                case (AdapterLoaded(command_id) | CommandFailed(command_id) | Done(command_id)) as answer:
                    future = self._answers.get(command_id)
                    if future is not None and not future.done():
                        future.set_result(answer)
                    elif isinstance(answer, CommandFailed):
                        log.error("an adapter could not be loaded again: %s", answer.message)

    async def _bury(self) -> None:
        """End everything that the dead process owed."""
        self._stats = _EMPTY_STATS
        if self._writer is not None:
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._child is not None:
            await self._child.wait()
        why = "The engine stopped." if self._stopping else "The engine died while it worked on this request."
        for request_id, inflight in self._inflight.items():
            if not any(output.finish_reason for output in inflight.pending):
                inflight.put(Output(request_id, finish_reason="error", error=why, error_kind="engine_died"))
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EngineUnavailableError(why, retry_after=5))


def _named_error(kind: str) -> type[OneBaseError]:
    found = getattr(errors, kind, None)
    return found if isinstance(found, type) and issubclass(found, OneBaseError) else AdapterFormatError
