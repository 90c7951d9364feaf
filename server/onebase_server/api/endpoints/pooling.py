"""POST /v1/embeddings and /v1/classify: requests that read their prompts and generate nothing."""

import asyncio
import base64
import math
import struct
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from onebase_engine.engine_info import HeadInfo
from onebase_engine.request import EngineRequest, Output, SamplingParams, Task
from onebase_engine.text.answer import GenerationError, generation_error
from onebase_engine.text.hard_prompt import templated
from onebase_server.api.adapters.composition import target_of
from onebase_server.api.adapters.directory import Target
from onebase_server.api.auth import Tenant
from onebase_server.api.disconnect import unless_disconnected
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.generation.prompts import check_length, check_prompt, check_unicode, prompt_tokens
from onebase_server.api.generation.sampling_params import fit
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.pooling import ClassificationRequest, EmbeddingRequest, PooledRequest
from onebase_server.api.services import Services, services_of
from onebase_server.logs import note

router = APIRouter(tags=["inference"])

_NOTHING = SamplingParams()
Places = Sequence[tuple[int, int]] | None


@router.post("/v1/embeddings", summary="Turn texts into vectors", **answers(doc.Embeddings))
async def create_embeddings(body: EmbeddingRequest, request: Request, tenant: Tenant) -> Response:
    """The mean of the last hidden states, of length 1; under an adapter, of the adapted model."""
    services = services_of(request)
    target = target_of(services.adapters, body)
    width = services.engine.info.width
    if body.dimensions is not None and body.dimensions > width:
        raise InvalidRequestError(f"An embedding has {width} numbers.", field="dimensions")
    special = body.add_special_tokens is not False
    prompts = []
    for prompt, field in _inputs(body):
        tokens = await prompt_tokens(services, target, prompt, add_special_tokens=special, field=field)
        prompts.append(_fitting(services, target, tokens, field))
    work = _run(services, target, prompts, "embed", f"embd-{uuid.uuid4().hex}", body, tenant)
    outputs = await unless_disconnected(request.receive, work)
    packed = body.encoding_format == "base64"
    vectors = [_first_of(output.embedding, body.dimensions) for output in outputs]
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if packed else vector}
        for index, vector in enumerate(vectors)
    ]
    return _json({"object": "list", "data": data, "model": target.name, "usage": _usage(prompts)})


@router.post("/classify", include_in_schema=False, response_model=None)
@router.post("/v1/classify", summary="Label texts, or each of their tokens", **answers(doc.Classification))
async def create_classification(body: ClassificationRequest, request: Request, tenant: Tenant) -> Response:
    """By the head of the adapter that `model` names: the answer is vLLM's, and for a head that labels tokens each
    token with its place in the text."""
    services = services_of(request)
    target = target_of(services.adapters, body)
    if target.head is None:
        raise InvalidRequestError(f"The model {target.name!r} has no classification head.", field="model")
    prompts, places = [], []
    for prompt, field in _inputs(body):
        tokens, where = await _placed_tokens(services, target, prompt, field)
        prompts.append(_fitting(services, target, tokens, field))
        places.append(where)
    request_id = f"classify-{uuid.uuid4().hex}"
    work = _run(services, target, prompts, "classify", request_id, body, tenant)
    outputs = await unless_disconnected(request.receive, work)
    data = []
    for index, (output, prompt, where) in enumerate(zip(outputs, prompts, places, strict=True)):
        if target.head.kind == "sequence":
            (probabilities,) = output.probabilities
            data.append({"index": index, **_labelled(target.head, probabilities)})
        else:
            data.append({"index": index, "tokens": _tokens(services, target.head, output, prompt, where)})
    return _json(
        {
            "id": request_id,
            "object": "list",
            "created": int(time.time()),
            "model": target.name,
            "labels": target.head.labels,
            "data": data,
            "usage": _usage(prompts),
        }
    )


def _inputs(body: PooledRequest) -> list[tuple[str | list[int], str]]:
    """Each input with the name of its field."""
    if len(body.input) == 1:
        return [(body.input[0], "input")]
    return [(prompt, f"input[{index}]") for index, prompt in enumerate(body.input)]


async def _placed_tokens(
    services: Services, target: Target, prompt: str | list[int], field: str
) -> tuple[list[int], Places]:
    """Tokens, and where each is in the input's text, if that is known."""
    if not isinstance(prompt, str):
        return await prompt_tokens(services, target, prompt, add_special_tokens=False, field=field), None
    check_unicode(prompt, field)
    text = templated(target.template, prompt)
    check_length(services, text, field)
    tokens, places = await asyncio.to_thread(services.codec.encode_with_places, text)
    check_prompt(services, tokens, field=field)
    before = len(target.template.before) if target.template is not None else 0
    end = len(prompt)
    # Tokens of the template are nowhere in the input.
    return tokens, [(min(max(start - before, 0), end), min(max(stop - before, 0), end)) for start, stop in places]


def _fitting(services: Services, target: Target, tokens: list[int], field: str) -> list[int]:
    fit(services, target, len(tokens), 0, field=field)
    return tokens


async def _run(
    services: Services,
    target: Target,
    prompts: Sequence[Sequence[int]],
    task: Task,
    request_id: str,
    body: PooledRequest,
    tenant: str,
) -> list[Output]:
    """The outputs, in order. When one fails, the others are aborted and its error is raised."""
    note(id=request_id, model=target.name, prompt_tokens=sum(map(len, prompts)))
    tasks = [
        asyncio.create_task(
            _one(
                services,
                target,
                target.request(f"{request_id}-{index}", prompt, _NOTHING, tenant, body.priority, task),
            )
        )
        for index, prompt in enumerate(prompts)
    ]
    try:
        outputs = await asyncio.gather(*tasks)
        note(queue_seconds=max(output.waited for output in outputs))
        return outputs
    finally:
        for running in tasks:
            running.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _one(services: Services, target: Target, request: EngineRequest) -> Output:
    with services.metrics.sequence(target.label, len(request.prompt)) as timer:
        async with aclosing(services.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.finish_reason in ("error", "abort"):
                    raise generation_error(output)
                if output.finish_reason is not None:
                    timer.waited = output.waited
                    timer.end(output.finish_reason)
                    return output
    raise GenerationError("The engine ended the request without saying why.", kind="internal")


def _labelled(head: HeadInfo, probabilities: Sequence[float]) -> dict[str, Any]:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {"label": head.labels[best], "probs": probabilities, "num_classes": len(probabilities)}


def _tokens(
    services: Services, head: HeadInfo, output: Output, prompt: Sequence[int], places: Places
) -> list[dict[str, Any]]:
    return [
        {
            "token": services.codec.token_text(token),
            "start": places[index][0] if places is not None else None,
            "end": places[index][1] if places is not None else None,
            **_labelled(head, probabilities),
        }
        for index, (token, probabilities) in enumerate(zip(prompt, output.probabilities, strict=True))
    ]


def _first_of(vector: Sequence[float], count: int | None) -> Sequence[float]:
    """The first numbers, made of length 1 again. Raises InvalidRequestError where there are fewer."""
    if count is None:
        return vector
    kept = vector[:count]
    length = math.hypot(*kept) or 1.0
    return [number / length for number in kept]


def _packed(vector: Sequence[float]) -> str:
    """OpenAI's base64: float32, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(prompts: Sequence[Sequence[int]]) -> dict[str, int]:
    count = sum(map(len, prompts))
    return {"prompt_tokens": count, "total_tokens": count}


def _json(document: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
