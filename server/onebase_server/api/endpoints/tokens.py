"""POST /tokenize and /detokenize, in vLLM's shapes."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from onebase_engine.text.hard_prompt import templated
from onebase_engine.text.tokenizer import TextCodec
from onebase_server.api.adapters.composition import target_of
from onebase_server.api.auth import require_key
from onebase_server.api.generation.prompts import check_prompt, encode, render_chat
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from onebase_server.api.services import services_of

_LONG = 2_000

router = APIRouter(tags=["tokens"], dependencies=[Depends(require_key)])


@router.post("/tokenize", summary="Text or a conversation to tokens", **answers(doc.Tokens))
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens that a completion or a chat with the same input would send to the engine."""
    services = services_of(request)
    target = target_of(services.adapters, body)
    if body.prompt is not None:
        text, special, field = (
            templated(target.template, body.prompt),
            body.add_special_tokens is not False,
            "prompt",
        )
    else:
        text = render_chat(
            services,
            target,
            body.messages or [],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        special, field = bool(body.add_special_tokens), "messages"
    tokens = await encode(services, text, add_special_tokens=special, field=field)
    known = {"count": len(tokens), "max_model_len": services.longest, "tokens": tokens}
    named = tokens if body.return_token_strs else None
    return await _aside(len(tokens), lambda: {**known, "token_strs": _texts(services.codec, named)})


@router.post("/detokenize", summary="Tokens to text", **answers(doc.Prompt))
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of a sequence, special tokens included."""
    services = services_of(request)
    services.adapters.resolve(body.model)
    if body.tokens:
        check_prompt(services, body.tokens, field="tokens")
    return await _aside(len(body.tokens), lambda: {"prompt": services.codec.decode(body.tokens)})


def _texts(codec: TextCodec, tokens: Sequence[int] | None) -> list[str] | None:
    return None if tokens is None else [codec.token_text(token) for token in tokens]


async def _aside(size: int, make: Callable[[], dict[str, Any]]) -> Response:
    """A reply of so many tokens, made on a thread where it is long: the event loop serves everybody's streams."""

    def encoded() -> bytes:
        return msgspec.json.encode(make())

    content = encoded() if size < _LONG else await asyncio.to_thread(encoded)
    return Response(content, media_type="application/json")
