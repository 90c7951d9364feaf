"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase_server.api.auth import Tenant
from onebase_server.api.choices import Choice, make_choices, run_all, usage_of
from onebase_server.api.disconnect import unless_disconnected
from onebase_server.api.grammar import grammar_of
from onebase_server.api.logprobs import for_chat
from onebase_server.api.requests import check_prompt, encode, fit, render_chat, sampling
from onebase_server.api.schemas import ChatRequest
from onebase_server.api.services import Services, services_of
from onebase_server.api.sse import ChunkFormat, SseResponse, Write, event
from onebase_server.engine.request import EngineRequest, TokenLogprobs
from onebase_server.logs import note

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions", summary="Answer a conversation", response_model=None)
async def create_chat_completion(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
    """OpenAI's chat endpoint; `model` is an adapter's name or the base's."""
    job = await _prepare(services_of(request), body, tenant)
    if body.stream:
        return SseResponse(job.stream)
    document = await unless_disconnected(request.receive, job.collect())
    return Response(msgspec.json.encode(document), media_type="application/json")


@dataclass(frozen=True)
class _Chat:
    """A checked request, ready to run."""

    services: Services
    body: ChatRequest
    envelope: dict[str, Any]
    """What the response, or each chunk, has beside its choices; without `object`."""
    choices: Sequence[Choice]

    async def collect(self) -> dict[str, Any]:
        """The whole response."""
        texts: dict[int, list[str]] = {choice.index: [] for choice in self.choices}
        logprobs: dict[int, list[TokenLogprobs]] = {choice.index: [] for choice in self.choices}

        async def show(choice: Choice, text: str) -> None:
            texts[choice.index].append(text)
            logprobs[choice.index] += choice.new_logprobs

        await run_all(self.services.engine, self.choices, show)
        return {
            **self.envelope,
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": "".join(texts[choice.index]), "refusal": None},
                    "logprobs": self._logprobs(logprobs[choice.index]) if self.body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
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

        async def show(choice: Choice, text: str) -> None:
            logprobs = self._logprobs(choice.new_logprobs) if choice.new_logprobs else None
            if choice.finish_reason is not None or logprobs is not None:
                reason, stop = choice.finish_reason, choice.stop_reason
                await write(chunks.full(choice.index, text, logprobs, reason, stop))
            elif text:
                await write(chunks.chunk(choice.index, text))

        await run_all(self.services.engine, self.choices, show)
        if not with_usage:
            return b""
        return event({**envelope, "choices": [], "usage": usage_of([self.choices])})

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return for_chat(self.services.codec, entries, self.body.top_logprobs or 0)


async def _prepare(services: Services, body: ChatRequest, tenant: str) -> _Chat:
    target = services.adapters.resolve(body.model)
    prompt = render_chat(
        services,
        target,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        variables=body.chat_template_kwargs,
    )
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
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    request = EngineRequest(request_id, tuple(tokens), params, target.adapter, tenant, body.priority or 0)
    note(id=request_id, model=target.name, prompt_tokens=len(tokens))
    envelope = {
        "id": request_id,
        "created": int(time.time()),
        "model": target.name,
        "system_fingerprint": services.engine.info.fingerprint,
    }
    return _Chat(services, body, envelope, make_choices(services, body, target, request, body.n or 1, 0))
