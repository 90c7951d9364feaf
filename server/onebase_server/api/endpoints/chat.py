"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase_engine.request import TokenLogprobs
from onebase_server.api.adapters.composition import target_of
from onebase_server.api.auth import Tenant
from onebase_server.api.disconnect import unless_disconnected
from onebase_server.api.generation.choices import Choice, make_choices, run_all, usage_of
from onebase_server.api.generation.logprobs import for_chat
from onebase_server.api.generation.prompts import check_length, check_prompt, encode, render_chat
from onebase_server.api.generation.sampling_params import fit, sampling
from onebase_server.api.generation.structured_output import grammar_of
from onebase_server.api.generation.tools import CallRules, ToolCall, ToolParser, tools_of
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.chat import ChatRequest
from onebase_server.api.services import Services, services_of
from onebase_server.api.sse import ChunkFormat, SseResponse, Write, event
from onebase_server.logs import note

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions", summary="Answer a conversation", **answers(doc.Chat, streams=True))
async def create_chat_completion(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
    """OpenAI's chat endpoint; `model` is an adapter's name or the base's."""
    job = await prepare_chat(services_of(request), body, tenant)
    if body.stream:
        return SseResponse(job.stream)
    document = await unless_disconnected(request.receive, job.collect())
    return Response(msgspec.json.encode(document), media_type="application/json")


@dataclass(frozen=True)
class Chat:
    """A checked request, ready to run."""

    services: Services
    body: ChatRequest
    envelope: dict[str, Any]
    """The fields of the response, or of each chunk, beside its choices; without `object`."""
    choices: Sequence[Choice]

    async def collect(self) -> dict[str, Any]:
        """The whole response."""
        answers = {choice.index: Answer(self.body) for choice in self.choices}

        async def show(choice: Choice, text: str) -> None:
            answers[choice.index].take(choice, text)
            answers[choice.index].logprobs += choice.new_logprobs
            answers[choice.index].tokens += choice.new_tokens

        await run_all(self.services.engine, self.choices, show)
        ids = bool(self.body.return_token_ids)
        return {
            **self.envelope,
            "object": "chat.completion",
            **({"prompt_token_ids": self.choices[0].request.prompt} if ids else {}),
            "choices": [
                {
                    "index": choice.index,
                    "message": answers[choice.index].message(),
                    "logprobs": self.logprobs(answers[choice.index].logprobs) if self.body.logprobs else None,
                    "finish_reason": answers[choice.index].finish_reason(choice),
                    "stop_reason": choice.stop_reason,
                    **({"token_ids": answers[choice.index].tokens} if ids else {}),
                }
                for choice in self.choices
            ],
            "usage": usage_of([self.choices]),
        }

    async def stream(self, write: Write) -> bytes:
        """Write the chunks; returns the last ones."""
        with_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        envelope = {**self.envelope, "object": "chat.completion.chunk"}
        chunks = ChunkFormat(
            {**envelope, "usage": None} if with_usage else envelope,
            first=b'"delta":{"role":"assistant","content":',
            before=b'"delta":{"content":',
            after=b"}",
        )
        answers = {choice.index: Answer(self.body) for choice in self.choices}
        ids = bool(self.body.return_token_ids)
        if ids:
            chunks.note(b'"prompt_token_ids":' + msgspec.json.encode(self.choices[0].request.prompt))

        async def show(choice: Choice, text: str) -> None:
            answer = answers[choice.index]
            shown, calls = answer.take(choice, text)
            logprobs = self.logprobs(choice.new_logprobs) if choice.new_logprobs else None
            if choice.finish_reason is not None or logprobs is not None or calls or ids:
                reason, stop = answer.finish_reason(choice), choice.stop_reason
                content = None if calls and not shown else shown
                tokens = choice.new_tokens if ids else None
                await write(chunks.full(choice.index, content, logprobs, reason, stop, _delta_of(calls), tokens))
            elif shown:
                await write(chunks.chunk(choice.index, shown))

        await run_all(self.services.engine, self.choices, show)
        if not with_usage:
            return b""
        return event({**envelope, "choices": [], "usage": usage_of([self.choices])})

    def logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """OpenAI's object for some tokens."""
        return for_chat(self.services.codec, entries, self.body.top_logprobs or 0)


class Answer:
    """One choice's message as it grows."""

    def __init__(self, body: ChatRequest) -> None:
        tools = tools_of(body)
        self._parser = ToolParser(tools, CallRules.of(body)) if tools else None
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprobs] = []
        self.tokens: list[int] = []

    def take(self, choice: Choice, text: str) -> tuple[str, list[tuple[int, ToolCall]]]:
        """The choice has got `text`: what of it is shown, and the calls that it completes, numbered."""
        if self._parser is None:
            self._texts.append(text)
            return text, []
        parts = self._parser.push(text)
        if choice.finish_reason is not None:
            parts += self._parser.finish(cut_off=choice.finish_reason == "length")
        elif self._parser.over:
            choice.finish_reason = "stop"
        shown = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, ToolCall)]
        numbered = list(enumerate(calls, len(self._calls)))
        self._texts.append(shown)
        self._calls += calls
        return shown, numbered

    def message(self) -> dict[str, Any]:
        """The whole."""
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": [call.document() for call in self._calls]}
        return message

    def finish_reason(self, choice: Choice) -> str | None:
        """The choice's, but for calls."""
        return "tool_calls" if self._calls and choice.finish_reason == "stop" else choice.finish_reason


def _delta_of(calls: Sequence[tuple[int, ToolCall]]) -> bytes:
    """Return the bytes that calls add to a chunk's delta."""
    if not calls:
        return b""
    return b',"tool_calls":' + msgspec.json.encode([{"index": n, **call.document()} for n, call in calls])


async def prepare_chat(services: Services, body: ChatRequest, tenant: str, *, prefix: str = "chatcmpl-") -> Chat:
    """Check a body and make its sequences; `prefix` begins its id. Raises an error of ours that names the field."""
    target = target_of(services.adapters, body)
    prompt = render_chat(
        services,
        target,
        body.messages,
        tools=tools_of(body),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
    )
    check_length(services, prompt, "messages")
    # The template has written the special tokens already.
    tokens = await encode(services, prompt, add_special_tokens=bool(body.add_special_tokens), field="messages")
    check_prompt(services, tokens, field="messages")
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = fit(services, target, len(tokens), wanted, field="messages")
    params = sampling(
        services,
        body,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=await grammar_of(body),
    )
    request_id = f"{prefix}{uuid.uuid4().hex}"
    request = target.request(request_id, tokens, params, tenant, body.priority)
    note(id=request_id, model=target.name, prompt_tokens=len(tokens))
    envelope = {
        "id": request_id,
        "created": int(time.time()),
        "model": target.name,
        "system_fingerprint": services.engine.info.fingerprint,
    }
    return Chat(services, body, envelope, make_choices(services, body, target, request, body.n or 1, 0))
