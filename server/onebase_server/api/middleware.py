"""Around every request: its id, a limit on the body, an answer where the code failed, a line in the log."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onebase_server.api.disconnect import ClientGoneError
from onebase_server.api.error_replies import INTERNAL, noted, reply_to
from onebase_server.logs import begin_request

log = logging.getLogger(__name__)

Around = Callable[[Scope, dict[str, Any]], AbstractContextManager[None]]
"""Takes a request's scope, and what will have been noted of it at its end."""

_GIVEN_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestGuard:
    """Pure ASGI: what it adds to a streamed chunk is one function call."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        body_limit: Callable[[str], int],
        answered: Callable[[str, str, int], None],
        around: Around | None = None,
    ) -> None:
        """`body_limit` gives the most bytes of a body by the request's path; `answered` is told of each answer:
        its route, method and status; `around` is entered for each request."""
        self._app = app
        self._body_limit = body_limit
        self._answered = answered
        self._around = around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        fields = begin_request(request_id.decode())
        with self._around(scope, fields) if self._around is not None else nullcontext():
            await self._guarded(scope, receive, send, headers, request_id, fields)

    async def _guarded(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Mapping[bytes, bytes],
        request_id: bytes,
        fields: dict[str, Any],
    ) -> None:
        begun = time.perf_counter()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if not started:
                started = True
                route = getattr(scope.get("route"), "path", "unmatched")
                self._answered(route, scope["method"], message["status"])
                fields["status"] = message["status"]
                more = [(b"x-request-id", request_id)]
                if ignored := fields.get("ignored"):
                    more.append((b"x-onebase-ignored", ", ".join(ignored).encode()))
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        limit = self._body_limit(scope["path"])
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(limit)
            return message

        try:
            announced = headers.get(b"content-length", b"")
            if announced.isdigit() and int(announced) > limit:
                raise _too_large(limit)
            await self._app(scope, receive_within_limit, send_with_id)
        except ClientGoneError:
            fields["client_gone"] = True
        except Exception as error:
            reply = noted(reply_to(error))
            if reply is INTERNAL:
                log.exception("a request failed: %s %s", scope["method"], scope["path"])
            if started:
                raise
            await reply.response()(scope, receive, send_with_id)
        finally:
            fields["seconds"] = round(time.perf_counter() - begun, 6)
            log.info("%s %s", scope["method"], scope["path"])


def _too_large(limit: int) -> HTTPException:
    # FastAPI turns any other exception met while it reads a body into a 400 of its own.
    return HTTPException(413, f"The body is larger than {limit} bytes.", {"connection": "close"})
