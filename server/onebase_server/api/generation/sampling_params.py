"""A body's sampling fields, checked and within the limits, as the engine takes them."""

from collections.abc import Mapping, Sequence

from onebase_engine.request import SamplingParams
from onebase_server.api.adapters.directory import Target
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.generation import Generation
from onebase_server.api.services import Services


def fit(services: Services, target: Target, prompt_tokens: int, max_tokens: int | None, *, field: str) -> int:
    """How many tokens may be generated: `max_tokens`, or with None all that fit. Raises InvalidRequestError."""
    room = services.longest - target.virtual_tokens - prompt_tokens
    wanted = 1 if max_tokens is None else max_tokens
    if wanted <= room:
        return room if max_tokens is None else max_tokens
    virtual = f" {target.virtual_tokens} of them are the adapter's." if target.virtual_tokens else ""
    asked = " and no room is left for the completion" if max_tokens is None else ""
    if max_tokens:
        asked = f" and {max_tokens} for the completion"
    raise InvalidRequestError(
        f"A request may have {services.longest} tokens in all.{virtual} This one has {prompt_tokens} in the "
        f"prompt{asked}.",
        field=field,
        code="context_length_exceeded",
    )


def sampling(
    services: Services,
    body: Generation,
    *,
    max_tokens: int,
    logprobs: int | None,
    grammar: str | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The engine's parameters for a body. Raises InvalidRequestError."""
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens ({body.min_tokens}) is more than max_tokens ({max_tokens}).", field="min_tokens"
        )
    vocabulary = services.engine.info.vocab
    _check_vocabulary(body.logit_bias or {}, vocabulary, "logit_bias")
    _check_vocabulary(body.stop_token_ids or (), vocabulary, "stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),  # vLLM writes "off" as -1, too
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def _check_vocabulary(tokens: Mapping[int, float] | Sequence[int], vocabulary: int, field: str) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(
                f"{field} names token {token}, which is not in the vocabulary of {vocabulary} tokens.", field=field
            )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
