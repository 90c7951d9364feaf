"""The parts that all bodies share. A field that could change an answer and is not supported is refused by name, and
so is one that nobody knows; one that cannot is accepted, and the reply's `x-onebase-ignored` names it.

Names and meanings are OpenAI's, and vLLM's for what goes beyond.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from onebase_engine.text.message_parts import joined
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.logs import note_ignored

MOST_SEQUENCES = 1024
"""Sequences that one request may ask for: prompts times n."""


class Refused:
    """Why a field that clients know is refused here, and the values of it that ask for nothing."""

    def __init__(self, why: str, *neutral: Any) -> None:
        self.why = why
        self.neutral = (None, *neutral)


class Body(BaseModel):
    """Strict: a number sent as a string is an error, and so is a field that does not exist."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: ClassVar[Mapping[str, Refused]] = {}
    ignored: ClassVar[AbstractSet[str]] = frozenset()
    """Fields that clients send and that cannot change an answer here."""

    @model_validator(mode="before")
    @classmethod
    def _sift(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.keys() <= cls.model_fields.keys():
            return data
        known, kept = _names(cls), {}
        for field, value in data.items():
            if (reason := cls.refused.get(field)) is not None:
                if value not in reason.neutral:
                    raise InvalidRequestError(f"{field} is not supported: {reason.why}.", field=field)
            elif field in cls.ignored:
                if value is not None:
                    note_ignored(field)
            elif value is not None or field in known:
                kept[field] = value
        if unknown := [field for field in kept if field not in known]:
            raise PydanticCustomError("unknown_fields", "unknown", {"unknown": unknown, "known": sorted(known)})
        return kept


def _names(model: type[BaseModel]) -> AbstractSet[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


MOST_TOKENS = 1 << 20
"""Tokens that one prompt may be sent as: more than any context."""


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0


def _prompts(value: Any) -> Any:
    """Any of OpenAI's four shapes to a list of strings or of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > (MOST_TOKENS if isinstance(value[0], int) else MOST_SEQUENCES):
            raise ValueError(f"has {len(value):,} items, more than a request may have")
        if _are_tokens(value):
            return [value]
        if all(isinstance(prompt, str) for prompt in value) or all(map(_are_tokens, value)):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_keys(value: Any) -> Any:
    """JSON's object keys are strings; logit_bias's are token ids."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except (TypeError, ValueError) as error:
        raise ValueError("keys must be token ids") from error


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_WITHOUT_EFFECT = {"annotations", "cache_control", "logprobs", "id"}
"""Fields of a part that cannot change an answer."""


def _text_of_parts(value: Any) -> Any:
    """A message's content: a string, or a list of text parts, which become lines as in vLLM."""
    if not isinstance(value, list):
        return value
    lines = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        said = "refusal" if kind == "refusal" else "text"
        if kind not in _TEXT_PARTS or not isinstance(part.get(said), str):
            raise ValueError(f"part {index} must be {{'type': 'text', 'text': ...}}; got type {kind!r}")
        for field in part.keys() - {"type", said}:
            if field not in _WITHOUT_EFFECT and part[field] is not None:
                raise ValueError(f"part {index} has an unknown field {field!r}")
            note_ignored(field)
        lines.append(part[said])
    return joined(lines)


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[StopString], BeforeValidator(_one_or_more), Field(max_length=64)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[int, Bias], BeforeValidator(_token_keys)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
Text = Annotated[str, BeforeValidator(_text_of_parts)]


class AdapterPart(Body):
    """One of the adapters that a request composes."""

    name: str = Field(min_length=1)
    weight: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)


class Targeted(Body):
    """A body that says what runs: the base, an adapter, or several at once."""

    model: str | None = None
    """An adapter's name, or the base's; left out, it is the base."""
    adapters: list[AdapterPart] | None = Field(None, min_length=1, max_length=8)
    """Instead of one adapter's name: several, whose changes of the base are weighted and added up."""


class Error(BaseModel):
    """One error: its message, its kind, and the field that it is about."""

    message: str
    type: str
    param: str | None
    """The field of the request that is wrong."""
    code: str | None


class ErrorDocument(BaseModel):
    """Every error, as OpenAI has them."""

    error: Error
