"""POST /tokenize and /detokenize, in vLLM's shapes."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from onebase_engine.text.hard_prompt import templated
from onebase_server.api.adapters.composition import target_of
from onebase_server.api.auth import require_key
from onebase_server.api.generation.prompts import check_prompt, encode, render_chat
from onebase_server.api.schemas import answers as doc
from onebase_server.api.schemas.answers import answers
from onebase_server.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from onebase_server.api.services import services_of

router = APIRouter(tags=["tokens"], dependencies=[Depends(require_key)])


@router.post("/tokenize", summary="Text or a conversation to tokens", **answers(doc.Tokens))
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """What a completion or a chat with the same input would send to the engine."""
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
    names = [services.codec.token_text(token) for token in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": services.longest,
        "tokens": tokens,
        "token_strs": names,
    }


@router.post("/detokenize", summary="Tokens to text", **answers(doc.Prompt))
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of a sequence, special tokens included."""
    services = services_of(request)
    services.adapters.resolve(body.model)
    if body.tokens:
        check_prompt(services, body.tokens, field="tokens")
    return {"prompt": services.codec.decode(body.tokens)}
