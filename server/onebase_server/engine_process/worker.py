"""The engine process: reads commands, steps the engine, writes events. Run as
`python -m onebase_server.engine_process.worker FD`, with one end of a socket pair as file descriptor FD.

It ends when it has drained, or when the API's end of the socket closes: nothing is left running behind.
"""

import enum
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from onebase_adapters.errors import OneBaseError
from onebase_engine.engine_config import EngineConfig
from onebase_engine.request import Output
from onebase_engine.start_phases import Phases
from onebase_server.engine_process.frames import frame, read_frame
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
    decode_command,
    encode,
)
from onebase_server.logs import configure_logging

if TYPE_CHECKING:  # what takes a while to import is imported once a start can say so
    from onebase_engine.engine import Engine
    from onebase_engine.residency.resident_adapters import Loading

log = logging.getLogger(__name__)


class _Signal(enum.Enum):
    """Signals that reach the inbox besides commands."""

    HANGUP = enum.auto()
    WAKE = enum.auto()
    """An adapter has been read."""
    SHOW = enum.auto()
    """Somebody wants to see what is in the batch."""


_Inbox = queue.SimpleQueue[Command | _Signal]


class Worker:
    """One engine, one connection."""

    def __init__(self, engine: "Engine", connection: socket.socket, inbox: _Inbox) -> None:
        self._engine = engine
        self._connection = connection
        self._inbox = inbox
        self._loading: list[tuple[LoadAdapter, Loading]] = []
        self._unloading: list[UnloadAdapter] = []
        self._deadline: float | None = None
        self._refused: list[Output] = []
        self._aborted = False
        """Whether a request was aborted since the last step: it has no output to carry the news in the stats."""

    def run(self) -> None:
        """Serve until drained or hung up."""
        while True:
            if not self._take_commands():
                return
            outputs = self._refused + self._engine.step()
            self._refused = []
            if self._deadline is not None and time.monotonic() >= self._deadline:
                outputs += self._engine.abort_all()
            if outputs or self._aborted:
                self.send(Outputs(tuple(outputs), self._engine.stats()))
                self._aborted = False
            self._answer_loads()
            self._unload_unused()
            if self._deadline is not None and not self._engine.busy:
                return

    def send(self, event: Event) -> None:
        """Write an event; a hang-up is noticed by the reader."""
        try:
            self._connection.sendall(frame(encode(event)))
        except (BrokenPipeError, ConnectionError):
            self._inbox.put(_Signal.HANGUP)

    def _take_commands(self) -> bool:
        """Handle what has come in; sleep for the first if there is nothing else to do. False after a hang-up."""
        wait = self._engine.idle and not self._refused and self._deadline is None
        if wait and (faults := self._engine.faults()):
            log.error("the engine's bookkeeping contradicts itself", extra={"fields": {"faults": faults}})
        while True:
            try:
                command = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if command is _Signal.HANGUP:
                return False
            if command is _Signal.SHOW:
                log.warning("the engine's batch", extra={"fields": self._engine.snapshot()})
            elif not isinstance(command, _Signal):
                self._handle(command)
            wait = False

    def _handle(self, command: Command) -> None:
        match command:
            case Submit(request):
                refused = self._engine.submit(request)
                if refused is not None:
                    self._refused.append(refused)
            case Abort(request_id):
                self._engine.abort(request_id)
                self._aborted = True
            case LoadAdapter(_, digest, folder):
                self._loading.append((command, self._engine.load_adapter(digest, folder)))
            case UnloadAdapter():
                self._unloading.append(command)
            case Drain(grace):
                self._deadline = time.monotonic() + grace

    def _answer_loads(self) -> None:
        for entry in [entry for entry in self._loading if entry[1].done()]:
            self._loading.remove(entry)
            self._answer_load(*entry)

    def _answer_load(self, command: LoadAdapter, loading: "Loading") -> None:
        try:
            self.send(AdapterLoaded(command.id, loading.result()))
        except OneBaseError as error:
            self.send(CommandFailed(command.id, type(error).__name__, error.message, error.field))

    def _unload_unused(self) -> None:
        for command in [c for c in self._unloading if self._engine.unload_adapter(c.digest)]:
            self._unloading.remove(command)
            self.send(Done(command.id))


def _read(connection: socket.socket, inbox: _Inbox, ready: threading.Event) -> None:
    """Bring the commands into the inbox. A hang-up while the model is still being loaded ends the process here."""
    while (message := read_frame(connection)) is not None:
        inbox.put(decode_command(message))
    if not ready.is_set():
        os._exit(1)
    inbox.put(_Signal.HANGUP)


def _load(config: EngineConfig, inbox: _Inbox, phases: Phases) -> "Engine":
    """Raises BaseModelError or ConfigError."""
    phases.begin("importing")
    from onebase_engine.kernels.lean_imports import stay_alone

    stay_alone()

    # Kernels are compiled beside all else that takes a while.
    from onebase_engine.kernels.choose import start_build

    kernels = start_build(config.base.device, phases.tell)
    from onebase_engine.startup import start_engine

    return start_engine(config, wake=lambda: inbox.put(_Signal.WAKE), phases=phases, kernels=kernels)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Read the configuration from the socket, load the engine, serve."""
    # Ctrl-C reaches the whole process group; the API process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(connection)
    if first is None:
        return
    config = msgspec.json.decode(first, type=EngineConfig)
    configure_logging(config.log_level, config.log_format, process="engine")
    inbox: _Inbox = queue.SimpleQueue()
    signal.signal(signal.SIGUSR1, lambda *_: inbox.put(_Signal.SHOW))
    ready = threading.Event()
    threading.Thread(target=_read, args=(connection, inbox, ready), name="command-reader", daemon=True).start()
    phases = Phases(log.info if config.log_format == "json" else _tell)
    gc.disable()  # what a start makes stays: looking for garbage in it takes a fifth of the imports' time
    try:
        engine = _load(config, inbox, phases)
    except OneBaseError as error:
        connection.sendall(frame(encode(StartFailed(error.message))))
        return
    ready.set()
    worker = Worker(engine, connection, inbox)
    gc.freeze()  # nor does a collection between two steps look through it
    gc.enable()
    worker.send(Ready(engine.info, engine.stats()))
    worker.run()
    engine.close()
    connection.close()


if __name__ == "__main__":
    main()
