"""From the fields that constrain an output to one grammar in llguidance's notation, checked."""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.generation.tools import SPACES, tool_grammar, tools_of
from onebase_server.api.schemas.chat import ChatRequest
from onebase_server.api.schemas.generation import Generation
from onebase_server.logs import note_ignored

_LONG = 10_000
"""Characters from which checking is worth a thread: the event loop serves everybody's streams."""
_LIMITS = LLParserLimits(verbose_errors=False)
_Given = tuple[str, str]
"""The field, and its grammar."""


async def grammar_of(body: Generation) -> str | None:
    """The grammar that a request asks for. Raises InvalidRequestError, naming the field."""
    given = [found for found in (_response_format(body), *_guided(body)) if found is not None]
    if len(given) > 1:
        raise InvalidRequestError(
            f"{given[0][0]} and {given[1][0]} cannot both say how the output is to be.", field=given[1][0]
        )
    if isinstance(body, ChatRequest) and tools_of(body):
        given = _with_tools(body, given)
    for field, grammar in given:
        check = LLMatcher.validate_grammar_with_warnings
        if len(grammar) < _LONG:
            wrong, messages = check(grammar, limits=_LIMITS)
        else:
            wrong, messages = await asyncio.to_thread(check, grammar, limits=_LIMITS)
        if wrong:
            raise InvalidRequestError(f"{field} cannot be followed: {messages[0]}", field=field)
        for key in re.findall(r'"([$\w]+)"|Unknown (format)', " ".join(messages)):
            note_ignored("".join(key))
        return grammar
    return None


def _with_tools(body: ChatRequest, given: list[_Given]) -> list[_Given]:
    """Calls have a grammar of their own; an answer without any still follows `response_format`."""
    schema = _response_schema(body)
    if given and schema is None:
        raise InvalidRequestError(f"{given[0][0]} does not go with tools.", field=given[0][0])
    final = None if schema is None else f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"
    grammar = tool_grammar(body, final)
    return given if grammar is None else [("tools", grammar)]


def json_grammar(schema: Any, field: str, *, lenient: bool = False) -> str:
    """Texts that a JSON schema describes; `lenient`: what grammars cannot hold is left to the caller.

    Raises InvalidRequestError."""
    _check_references(schema, field)
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={**SPACES, "lenient": lenient})  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(f"{field} is not a JSON schema: {error}", field=field) from error


def _check_references(schema: Any, field: str) -> None:
    """Refuse a `$ref` that leads to nothing but itself: no text would ever do."""
    parts = [schema]
    while parts:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        seen: set[str] = set()
        while isinstance(part, dict) and isinstance(reference := part.get("$ref"), str) and reference[:1] == "#":
            if reference in seen:
                raise InvalidRequestError(f"{field}: {reference!r} refers to nothing but itself.", field=field)
            seen.add(reference)
            part = _found(schema, reference)


def _found(schema: Any, reference: str) -> Any:
    """Return the part of a schema that a JSON pointer (RFC 6901) leads to; None where there is nothing."""
    for key in filter(None, reference[1:].split("/")):
        schema = schema.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(schema, dict) else None
    return schema


def _response_format(body: Generation) -> _Given | None:
    schema = _response_schema(body)
    if schema is None:
        return None
    given = body.response_format.json_schema if body.response_format is not None else None
    field = "response_format" if given is None else "response_format.json_schema.schema"
    lenient = given is not None and given.strict is False
    return field, json_grammar(schema, field, lenient=lenient)


def _response_schema(body: Generation) -> dict[str, Any] | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.json_schema is not None:
        return form.json_schema.schema_ or {}
    return {"type": "object"} if form.schema_ is None else form.schema_


def _guided(body: Generation) -> Sequence[_Given | None]:
    earlier = (
        _optional("guided_json", body.guided_json, json_grammar),
        _optional("guided_regex", body.guided_regex, _regex),
        _optional("guided_grammar", body.guided_grammar, _lark),
        _optional("guided_choice", body.guided_choice, _choice),
    )
    if (later := body.structured_outputs) is None:
        return earlier
    anything = {"type": "object"} if later.json_object else None
    return (
        *earlier,
        _optional("structured_outputs.json", later.json_, json_grammar),
        _optional("structured_outputs.json_object", anything, json_grammar),
        _optional("structured_outputs.regex", later.regex, _regex),
        _optional("structured_outputs.grammar", later.grammar, _lark),
        _optional("structured_outputs.choice", later.choice, _choice),
    )


def _optional(field: str, value: Any, make: Any) -> _Given | None:
    return None if value is None else (field, make(value, field))


def _regex(regex: str, _: str) -> str:
    return LLMatcher.grammar_from_regex(regex)


def _lark(grammar: str, _: str) -> str:
    return LLMatcher.grammar_from_lark(grammar)


def _choice(choices: Sequence[str], _: str) -> str:
    # Lark writes a string as JSON does.
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return LLMatcher.grammar_from_lark(f"start: {texts}")
