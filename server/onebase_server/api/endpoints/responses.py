"""POST /v1/responses for text and function calls: a chat in other words. Nothing is stored: send the whole."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase_adapters.errors import OneBaseError
from onebase_engine.request import TokenLogprobs
from onebase_server.api.auth import Tenant
from onebase_server.api.disconnect import unless_disconnected
from onebase_server.api.endpoints.chat import Answer, Chat, prepare_chat
from onebase_server.api.generation.choices import Choice, run_all, usage_of
from onebase_server.api.generation.tools import ToolCall
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.chat import ChatRequest
from onebase_server.api.schemas.responses import AllowedFunctions, NamedFunction, ResponseInput, ResponsesRequest
from onebase_server.api.services import services_of
from onebase_server.api.sse import SseResponse, Write

router = APIRouter(tags=["inference"])

_FIELDS = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
"""Names of fields in a chat, and their names here."""


@router.post("/v1/responses", summary="Answer an input", **answers(doc.Response, streams=True))
async def create_response(body: ResponsesRequest, request: Request, tenant: Tenant) -> Response:
    """OpenAI's responses endpoint; `model` is an adapter's name or the base's."""
    try:
        chat = await prepare_chat(services_of(request), _as_chat(body), tenant, prefix="resp_")
    except OneBaseError as error:
        first, dot, rest = (error.field or "").partition(".")
        error.field = (_FIELDS.get(first, first) + dot + rest) or None
        raise
    job = _Response(body, chat)
    if body.stream:
        return SseResponse(job.stream)
    document = await unless_disconnected(request.receive, job.collect())
    return Response(msgspec.json.encode(document), media_type="application/json")


@dataclass(frozen=True)
class _Response:
    """A checked request, ready to run."""

    body: ResponsesRequest
    chat: Chat

    async def collect(self) -> dict[str, Any]:
        """The whole response."""
        items = _Items()
        answer = Answer(self.chat.body)

        async def show(choice: Choice, text: str) -> None:
            shown, calls = answer.take(choice, text)
            answer.logprobs += choice.new_logprobs
            items.add(shown, [call for _, call in calls])

        await run_all(self.chat.services.engine, self.chat.choices, show)
        items.end()
        return self._document(items, self._logprobs(answer.logprobs))

    async def stream(self, write: Write) -> bytes:
        """Write the events; the last one goes out here, too."""
        items = _Items()
        answer = Answer(self.chat.body)
        number = told = 0
        """The next event's number, and how many log-probabilities have been told."""

        async def tell(kind: str, **fields: Any) -> None:
            nonlocal number
            document = {"type": kind, "sequence_number": number, **fields}
            number += 1
            await write(b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(document) + b"\n\n")

        async def show(choice: Choice, text: str) -> None:
            nonlocal told
            if not number:
                begun = self._document(items, [], begun=True)
                await tell("response.created", response=begun)
                await tell("response.in_progress", response=begun)
            shown, calls = answer.take(choice, text)
            answer.logprobs += choice.new_logprobs
            for kind, fields in items.add(shown, [call for _, call in calls]):
                if kind == "response.output_text.delta":
                    fields["logprobs"] = self._logprobs(answer.logprobs[told:])
                    told = len(answer.logprobs)
                await tell(kind, **fields)

        await run_all(self.chat.services.engine, self.chat.choices, show)
        logprobs = self._logprobs(answer.logprobs)
        for kind, fields in items.end():
            if kind == "response.output_text.done":
                fields["logprobs"] = logprobs
            await tell(kind, **fields)
        document = self._document(items, logprobs)
        await tell(f"response.{document['status']}", response=document)
        return b""

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        if not self.chat.body.logprobs:
            return []
        content: list[dict[str, Any]] = self.chat.logprobs(entries)["content"]
        return content

    def _document(self, items: "_Items", logprobs: list[dict[str, Any]], *, begun: bool = False) -> dict[str, Any]:
        """The response; `begun` is how it was before the first output."""
        body, chat = self.body, self.chat
        (choice,) = chat.choices
        usage = usage_of([chat.choices])
        cut_off = choice.finish_reason == "length" and not begun
        status = "in_progress" if begun else "incomplete" if cut_off else "completed"
        return {
            "id": chat.envelope["id"],
            "object": "response",
            "created_at": chat.envelope["created"],
            "completed_at": None if begun else int(time.time()),
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": chat.envelope["model"],
            "output": items.documents(status, logprobs),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text_format().model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None
            if begun
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
            "user": body.user,
        }


Events = list[tuple[str, dict[str, Any]]]


class _Items:
    """The output's items as they come: at most one message, and calls; with the events that tell of them."""

    def __init__(self) -> None:
        self._order: list[ToolCall | None] = []
        """None is the message."""
        self._ids: list[str] = []
        self._texts: list[str] = []

    def add(self, text: str, calls: Sequence[ToolCall]) -> Events:
        """Text and calls that have come."""
        events: Events = []
        if text:
            events += self._open_message()
            self._texts.append(text)
            place = self._place_of_message()
            events.append(("response.output_text.delta", {**place, "delta": text}))
        for call in calls:
            self._order.append(call)
            self._ids.append(f"fc_{uuid.uuid4().hex}")
            events += self._events_of_call(len(self._order) - 1, call)
        return events

    def end(self) -> Events:
        """No more comes; an answer without anything is an empty message."""
        events: Events = [] if self._order else self._open_message()
        if None not in self._order:
            return events
        place = self._place_of_message()
        text = "".join(self._texts)
        part = {"type": "output_text", "text": text, "annotations": []}
        item = self._document(place["output_index"], "completed", [])
        return [
            *events,
            ("response.output_text.done", {**place, "text": text}),
            ("response.content_part.done", {**place, "part": part}),
            ("response.output_item.done", {"output_index": place["output_index"], "item": item}),
        ]

    def documents(self, status: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All items."""
        return [self._document(index, status, logprobs) for index in range(len(self._order))]

    def _document(self, index: int, status: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        call = self._order[index]
        if call is not None:
            return _call_item(self._ids[index], call, call.arguments, "completed")
        text = {"type": "output_text", "text": "".join(self._texts), "annotations": [], "logprobs": logprobs}
        return {**self._message(index), "status": status, "content": [text]}

    def _message(self, index: int) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._ids[index],
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }

    def _open_message(self) -> Events:
        if None in self._order:
            return []
        self._order.append(None)
        self._ids.append(f"msg_{uuid.uuid4().hex}")
        place = self._place_of_message()
        index = place["output_index"]
        part = {"type": "output_text", "text": "", "annotations": []}
        return [
            ("response.output_item.added", {"output_index": index, "item": self._message(index)}),
            ("response.content_part.added", {**place, "part": part}),
        ]

    def _place_of_message(self) -> dict[str, Any]:
        index = self._order.index(None)
        return {"item_id": self._ids[index], "output_index": index, "content_index": 0}

    def _events_of_call(self, index: int, call: ToolCall) -> Events:
        item_id = self._ids[index]
        place = {"item_id": item_id, "output_index": index}
        begun = _call_item(item_id, call, "", "in_progress")
        done = _call_item(item_id, call, call.arguments, "completed")
        finished = {**place, "name": call.name, "arguments": call.arguments}
        return [
            ("response.output_item.added", {"output_index": index, "item": begun}),
            ("response.function_call_arguments.delta", {**place, "delta": call.arguments}),
            ("response.function_call_arguments.done", finished),
            ("response.output_item.done", {"output_index": index, "item": done}),
        ]


def _call_item(item_id: str, call: ToolCall, arguments: str, status: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": item_id,
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
        "status": status,
    }


def _as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat. Raises InvalidRequestError."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for item in body.input:
        _append(turns, item)
    form = body.text_format()
    schema = {"name": form.name or "schema", "schema": form.schema_} if form.type == "json_schema" else None
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        choice = _named(choice)
    elif isinstance(choice, AllowedFunctions):
        tools = [_named(each) for each in choice.tools]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return ChatRequest.model_validate(
        {
            "model": body.model,
            "adapters": body.adapters,
            "messages": turns,
            "tools": [
                {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools or ()
            ],
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "response_format": {"type": form.type, "json_schema": schema},
            "max_completion_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "logprobs": "message.output_text.logprobs" in (body.include or ()) or bool(body.top_logprobs),
            "top_logprobs": body.top_logprobs,
        }
    )


def _named(function: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


def _append(turns: list[dict[str, Any]], item: ResponseInput) -> None:
    """An input item as a turn; calls belong to the assistant's turn before them."""
    if item.type == "message":
        turns.append({"role": item.role, "content": item.content})
    elif item.type == "function_call_output":
        turns.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    else:
        if not turns or turns[-1]["role"] != "assistant":
            turns.append({"role": "assistant", "content": None})
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turns[-1].setdefault("tool_calls", []).append(call)


def _plain(choice: Any) -> Any:
    return choice.model_dump() if isinstance(choice, NamedFunction | AllowedFunctions) else choice
