"""Messages between the API process and the engine process, over a socket: commands one way, events the other.

Every command with an `id` gets exactly one answer with the same `id` (a request: a last Output). Encoded with
msgspec's MessagePack; each message is a frame with a 4-byte length in front.
"""

from collections.abc import Callable

import msgspec

from onebase_engine.engine_info import AdapterInfo, EngineInfo, EngineStats
from onebase_engine.request import EngineRequest, Output


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request; answered by Outputs."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a request and free what it holds. An id that is not running is ignored: it may just have ended."""

    id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read, check and lower the adapter in `folder`; answered by AdapterLoaded or CommandFailed."""

    id: str
    digest: str
    folder: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget an adapter once no request uses it; answered by Done."""

    id: str
    digest: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Finish what was accepted, within `grace` seconds, then exit. What is left then ends as `abort`."""

    grace: float


Command = Submit | Abort | LoadAdapter | UnloadAdapter | Drain


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo
    stats: EngineStats


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start, for a reason that a restart would not mend."""

    message: str


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All that one step produced."""

    outputs: tuple[Output, ...]
    stats: EngineStats


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    id: str
    info: AdapterInfo


class Done(msgspec.Struct, frozen=True, tag=True):
    id: str


class CommandFailed(msgspec.Struct, frozen=True, tag=True):
    """`kind` is the name of a class in `onebase_adapters.errors`."""

    id: str
    kind: str
    message: str
    field: str | None = None


Event = Ready | StartFailed | Outputs | AdapterLoaded | Done | CommandFailed

encode = msgspec.msgpack.Encoder().encode
decode_command: Callable[[bytes], Command] = msgspec.msgpack.Decoder(Command).decode
decode_event: Callable[[bytes], Event] = msgspec.msgpack.Decoder(Event).decode
