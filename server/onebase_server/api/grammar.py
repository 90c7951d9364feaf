"""From the fields that constrain an output to one grammar in llguidance's notation, checked."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from onebase_server.api.errors import InvalidRequestError
from onebase_server.api.schemas import Generation

_LONG = 10_000
"""Characters from which checking is worth a thread: the event loop serves everybody's streams."""
_LIMITS = LLParserLimits(verbose_errors=False)
# Some space for people, and an end to it: a small model can get lost in white space.
_SPACES = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
_Given = tuple[str, str]
"""The field, and its grammar."""


async def grammar_of(body: Generation) -> str | None:
    """The grammar that a request asks for. Raises InvalidRequestError, naming the field."""
    given = [found for found in (_response_format(body), *_guided(body)) if found is not None]
    if not given:
        return None
    if len(given) > 1:
        raise InvalidRequestError(
            f"{given[0][0]} and {given[1][0]} cannot both say how the output is to be.", field=given[1][0]
        )
    field, grammar = given[0]
    if len(grammar) < _LONG:
        error = LLMatcher.validate_grammar(grammar, limits=_LIMITS)
    else:
        error = await asyncio.to_thread(LLMatcher.validate_grammar, grammar, limits=_LIMITS)
    if error and not error.startswith("WARNING"):
        raise InvalidRequestError(f"{field} cannot be followed: {error}", field=field)
    return grammar


def json_grammar(schema: Any, field: str) -> str:
    """Texts that a JSON schema describes. Raises InvalidRequestError."""
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_SPACES)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{field} is not a JSON schema: {error}", field=field) from error


def _response_format(body: Generation) -> _Given | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return "response_format", json_grammar({"type": "object"}, "response_format")
    field = "response_format.json_schema.schema"
    return field, json_grammar(form.json_schema.schema_ or {}, field)


def _guided(body: Generation) -> Sequence[_Given | None]:
    return (
        _optional("guided_json", body.guided_json, json_grammar),
        _optional("guided_regex", body.guided_regex, lambda regex, _: LLMatcher.grammar_from_regex(regex)),
        _optional("guided_grammar", body.guided_grammar, lambda lark, _: LLMatcher.grammar_from_lark(lark)),
        _optional("guided_choice", body.guided_choice, _choice),
    )


def _optional(field: str, value: Any, make: Any) -> _Given | None:
    return None if value is None else (field, make(value, field))


def _choice(choices: Sequence[str], _: str) -> str:
    # Lark writes a string as JSON does.
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return LLMatcher.grammar_from_lark(f"start: {texts}")
