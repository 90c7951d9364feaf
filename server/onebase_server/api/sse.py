"""Server-sent events at little cost: a hand-written ASGI response, and chunks whose constant parts are made once.

A step of the engine yields a token for each of many streams, so what is done per chunk decides how much of the
machine HTTP takes: here it is one JSON string escape, one concatenation and one write.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from onebase_server.api.disconnect import ClientGoneError, unless_disconnected
from onebase_server.api.error_replies import INTERNAL, noted, reply_to

log = logging.getLogger(__name__)

_encode = msgspec.json.encode
_DONE = b"data: [DONE]\n\n"
_GOES_ON = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would gather chunks otherwise
]

Write = Callable[[bytes], Awaitable[None]]


def event(document: object) -> bytes:
    """One event with a JSON document."""
    return b"data: " + _encode(document) + b"\n\n"


class ChunkFormat:
    """The chunks of one response. A choice's text sits between `before` and `after`."""

    __slots__ = ("_after", "_before", "_envelope", "_first", "_heads", "_noted", "_plain")

    def __init__(
        self, envelope: dict[str, Any], *, before: bytes, after: bytes, first: bytes | None = None
    ) -> None:
        """`envelope` is the chunk without its choices; `first` stands for `before` in a choice's first chunk."""
        self._envelope = b"data: " + _encode(envelope)[:-1] + b',"choices":[{"index":'
        self._before = before
        self._first = before if first is None else first
        self._after = after
        self._plain = after + _GOES_ON
        self._noted = b""
        self._heads: dict[int, bytes] = {}

    def chunk(self, index: int, text: str) -> bytes:
        """The next text of a choice that goes on, without log-probabilities: nearly every chunk is one."""
        return self._head(index) + _encode(text) + self._plain

    def full(
        self,
        index: int,
        text: str | None,
        logprobs: object,
        finish_reason: str | None,
        stop_reason: object,
        more: bytes = b"",
        tokens: Sequence[int] | None = None,
    ) -> bytes:
        """A chunk with more to say than text; `more` is JSON that stands right behind the text,
        `tokens` are the text's ids."""
        ids = b"" if tokens is None else b',"token_ids":' + _encode(tokens)
        noted, self._noted = self._noted, b""
        return b'%b%b%b%b,"logprobs":%b,"finish_reason":%b,"stop_reason":%b%b}]%b}\n\n' % (
            self._head(index),
            _encode(text),
            more,
            self._after,
            _encode(logprobs),
            _encode(finish_reason),
            _encode(stop_reason),
            ids,
            noted,
        )

    def note(self, member: bytes) -> None:
        """Let the next `full` chunk have one more member beside its choices."""
        self._noted += b"," + member

    def _head(self, index: int) -> bytes:
        head = self._heads.get(index)
        if head is None:
            opening = self._envelope + str(index).encode() + b","
            self._heads[index] = opening + self._before
            return opening + self._first
        return head


class SseResponse(Response):
    """Runs `produce` with a function that writes events; ends the stream with what it returns and `[DONE]`.

    The status goes out with the first event: what fails before it is still answered with its own status, so that
    clients retry. What fails later becomes an `error` event. A client that disconnects cancels `produce`.
    """

    def __init__(self, produce: Callable[[Write], Awaitable[bytes]]) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = list(_HEADERS)
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        starting = asyncio.Lock()

        async def write(body: bytes) -> None:
            nonlocal started
            if not started:
                async with starting:  # several choices may have their first event at once
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            last = await unless_disconnected(receive, self._run(write))
        except ClientGoneError:
            return
        except Exception as error:
            if not started:
                raise
            reply = noted(reply_to(error))
            if reply is INTERNAL:
                log.exception("a stream failed")
            last = b"data: " + reply.body() + b"\n\n"
        await send({"type": "http.response.body", "body": last + _DONE, "more_body": False})

    async def _run(self, write: Write) -> bytes:
        return await self._produce(write)
