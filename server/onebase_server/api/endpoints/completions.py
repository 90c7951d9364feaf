"""POST /v1/completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase_engine.request import TokenLogprobs
from onebase_engine.text.hard_prompt import templated
from onebase_server.api.adapters.composition import target_of
from onebase_server.api.adapters.directory import Target
from onebase_server.api.auth import Tenant
from onebase_server.api.disconnect import unless_disconnected
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.generation.choices import Choice, make_choices, run_all, usage_of
from onebase_server.api.generation.logprobs import CompletionLogprobs, joined
from onebase_server.api.generation.prompts import prompt_tokens
from onebase_server.api.generation.sampling_params import fit, sampling
from onebase_server.api.generation.structured_output import grammar_of
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.body import MOST_SEQUENCES
from onebase_server.api.schemas.completions import CompletionRequest
from onebase_server.api.services import Services, services_of
from onebase_server.api.sse import ChunkFormat, SseResponse, Write, event
from onebase_server.logs import note

router = APIRouter(tags=["inference"])

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", summary="Continue a prompt", **answers(doc.Completion, streams=True))
async def create_completion(body: CompletionRequest, request: Request, tenant: Tenant) -> Response:
    """OpenAI's completions endpoint; `model` is an adapter's name or the base's."""
    job = await _prepare(services_of(request), body, tenant)
    if body.stream:
        return SseResponse(job.stream)
    document = await unless_disconnected(request.receive, job.collect())
    return Response(msgspec.json.encode(document), media_type="application/json")


@dataclass(frozen=True)
class _Completion:
    """A checked request, ready to run."""

    services: Services
    body: CompletionRequest
    envelope: dict[str, Any]
    """The fields of the response, or of each chunk, beside its choices."""
    groups: Sequence[Sequence[Choice]]
    """The choices of each prompt."""
    echoed: Sequence[str]
    """Each prompt's text, where it is to be repeated, else empty."""

    async def collect(self) -> dict[str, Any]:
        """The whole response."""
        choices = [choice for group in self.groups for choice in group]
        renderers = self._renderers()
        texts: dict[int, list[str]] = {choice.index: [] for choice in choices}
        logprobs: dict[int, list[dict[str, Any]]] = {choice.index: [] for choice in choices}
        tokens: dict[int, list[int]] = {choice.index: [] for choice in choices}
        scores = dict.fromkeys(texts, 0.0)

        async def show(choice: Choice, text: str) -> None:
            scores[choice.index] += sum(entry.logprob for entry in choice.new_logprobs)
            text, part = renderers[choice.index].render(text)
            texts[choice.index].append(text)
            tokens[choice.index] += choice.new_tokens
            if part is not None:
                logprobs[choice.index].append(part)

        await run_all(self.services.engine, choices, show)
        kept = [choice for group in self.groups for choice in _best(group, scores, self.body.n or 1)]
        return {
            **self.envelope,
            "choices": [
                {
                    "index": index,
                    "text": "".join(texts[choice.index]),
                    "logprobs": joined(logprobs[choice.index]) if self.body.logprobs is not None else None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    **(_ids(choice, tokens[choice.index]) if self.body.return_token_ids else {}),
                }
                for index, choice in enumerate(kept)
            ],
            "usage": self._usage(),
        }

    async def stream(self, write: Write) -> bytes:
        """Write the chunks; returns the last ones."""
        renderers = self._renderers()
        with_usage = self.body.stream_options is not None and bool(self.body.stream_options.include_usage)
        envelope = {**self.envelope, "usage": None} if with_usage else self.envelope
        chunks = ChunkFormat(envelope, before=b'"text":', after=b"")
        ids = bool(self.body.return_token_ids)
        begun: set[int] = set()

        async def show(choice: Choice, text: str) -> None:
            index = choice.index
            text, logprobs = renderers[index].render(text)
            if choice.finish_reason is not None or logprobs is not None or ids:
                tokens = choice.new_tokens if ids else None
                prompt = b',"prompt_token_ids":' + msgspec.json.encode(choice.request.prompt)
                more = prompt if ids and index not in begun else b""
                begun.add(index)
                reason, stop = choice.finish_reason, choice.stop_reason
                await write(chunks.full(index, text, logprobs, reason, stop, more, tokens))
            elif text:
                await write(chunks.chunk(index, text))

        await run_all(self.services.engine, [choice for group in self.groups for choice in group], show)
        return event({**self.envelope, "choices": [], "usage": self._usage()}) if with_usage else b""

    def _renderers(self) -> dict[int, "_Renderer"]:
        return {
            choice.index: _Renderer(self.services, self.body, choice, echoed)
            for group, echoed in zip(self.groups, self.echoed, strict=True)
            for choice in group
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self.groups)
        if self.body.max_tokens == 0:  # the token that the engine had to generate is nobody's
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


class _Renderer:
    """Renders one choice: its text and log-probabilities, after the prompt's where that is echoed."""

    def __init__(self, services: Services, body: CompletionRequest, choice: Choice, echoed: str) -> None:
        self._choice = choice
        self._echo = bool(body.echo)
        self._echoed = echoed
        self._first = True
        self._only_echo = body.max_tokens == 0
        self._logprobs = None if body.logprobs is None else CompletionLogprobs(services.codec, body.logprobs)

    def render(self, text: str) -> tuple[str, dict[str, Any] | None]:
        """For the text that the choice's latest output gave; the logprobs object is None if there is none."""
        first, self._first = self._first, False
        if self._only_echo:
            text = ""
        if first:
            text = self._echoed + text
        if self._logprobs is None:
            return text, None
        choice = self._choice
        entries: list[TokenLogprobs | None] = []
        tokens: list[int] = []
        if first and self._echo:
            tokens += choice.request.prompt
            entries += choice.prompt_logprobs or [None] * len(tokens)
        if not self._only_echo:
            tokens += [entry.token for entry in choice.new_logprobs]
            entries += choice.new_logprobs
        return text, self._logprobs.add(tokens, entries) if tokens else None


def _ids(choice: Choice, tokens: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": choice.request.prompt, "token_ids": tokens}


def _best(group: Sequence[Choice], scores: dict[int, float], count: int) -> Sequence[Choice]:
    """best_of: the `count` choices whose tokens are the most likely on average, best first."""
    if len(group) == count:
        return group
    ranked = sorted(group, key=lambda choice: scores[choice.index] / max(choice.text.tokens, 1), reverse=True)
    return ranked[:count]


async def _prepare(services: Services, body: CompletionRequest, tenant: str) -> _Completion:
    target = target_of(services.adapters, body)
    count = _sequences_per_prompt(body)
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise InvalidRequestError("max_tokens must be at least 1 (0 is for echo: true).", field="max_tokens")
    special = body.add_special_tokens is not False
    fields = ["prompt" if len(body.prompt) == 1 else f"prompt[{number}]" for number in range(len(body.prompt))]
    prompts = [
        await prompt_tokens(services, target, prompt, add_special_tokens=special, field=field)
        for prompt, field in zip(body.prompt, fields, strict=True)
    ]
    wanted = None if max_tokens == -1 else max(max_tokens, 1)
    room = [
        fit(services, target, len(tokens), wanted, field=field)
        for tokens, field in zip(prompts, fields, strict=True)
    ]
    logprobs = body.logprobs
    if logprobs is None and count > (body.n or 1):
        logprobs = 0  # best_of ranks by them
    params = sampling(
        services,
        body,
        max_tokens=min(room),
        logprobs=logprobs,
        grammar=await grammar_of(body),
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    request_id = f"cmpl-{uuid.uuid4().hex}"
    groups: list[list[Choice]] = []
    echoed: list[str] = []
    for number, (prompt, tokens) in enumerate(zip(body.prompt, prompts, strict=True)):
        request = target.request(request_id, tokens, params, tenant, body.priority)
        groups.append(make_choices(services, body, target, request, count, number * count))
        echoed.append(_echo(services, body, target, prompt, tokens))
    note(
        id=request_id,
        model=target.name,
        prompt_tokens=sum(len(group[0].request.prompt) for group in groups),
    )
    envelope = {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": target.name,
        "system_fingerprint": services.engine.info.fingerprint,
    }
    return _Completion(services, body, envelope, groups, echoed)


def _sequences_per_prompt(body: CompletionRequest) -> int:
    wanted = body.n or 1
    count = wanted if body.best_of is None else body.best_of
    if count < wanted:
        raise InvalidRequestError(f"best_of ({count}) is less than n ({wanted}).", field="best_of")
    if count > wanted and body.stream:
        raise InvalidRequestError("best_of above n cannot be streamed.", field="best_of")
    if count * len(body.prompt) > MOST_SEQUENCES:
        raise InvalidRequestError(
            f"{len(body.prompt)} prompts times {count} are more than {MOST_SEQUENCES} sequences.", field="prompt"
        )
    return count


def _echo(
    services: Services, body: CompletionRequest, target: Target, prompt: str | list[int], tokens: list[int]
) -> str:
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return templated(target.template, prompt)
    return services.codec.decode(tokens, skip_special=body.skip_special_tokens is not False)
