"""From a checked body to what the engine is asked: prompts as tokens, sampling parameters, and their limits."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from onebase_engine.text.hard_prompt import templated, templated_tokens, templated_turns
from onebase_engine.text.tool_text import spell_out
from onebase_server.api.adapters.directory import Target
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.chat import Message, Tool
from onebase_server.api.services import Services

_LONG_TEXT = 20_000
"""Characters from which tokenising is worth a thread: the event loop serves everybody's streams."""


async def prompt_tokens(
    services: Services, target: Target, prompt: str | Sequence[int], *, add_special_tokens: bool, field: str
) -> list[int]:
    """Token ids of a prompt as the target gets it: with its template around it, checked.

    Raises InvalidRequestError."""
    if isinstance(prompt, str):
        text = templated(target.template, prompt)
        check_length(services, text, field)
        tokens = await encode(services, text, add_special_tokens=add_special_tokens, field=field)
    else:
        tokens = templated_tokens(services.codec, target.template, prompt)
    check_prompt(services, tokens, field=field)
    return tokens


async def encode(services: Services, text: str, *, add_special_tokens: bool, field: str) -> list[int]:
    """Token ids of a text. Raises InvalidRequestError for half a surrogate pair, which JSON can write and UTF-8
    cannot."""
    check_unicode(text, field)
    if len(text) < _LONG_TEXT:
        return services.codec.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(services.codec.encode, text, add_special_tokens=add_special_tokens)


def check_length(services: Services, text: str, field: str) -> None:
    """Refuse a text that cannot fit before any work is done on it. Raises InvalidRequestError."""
    if (least := services.codec.least_tokens(text)) > services.longest:
        raise InvalidRequestError(
            f"A request may have {services.longest} tokens in all. This one has {least} or more in the prompt.",
            field=field,
            code="context_length_exceeded",
        )


def check_unicode(text: str, field: str) -> None:
    """Raises InvalidRequestError for a text that UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"Character {error.start} is a lone surrogate.", field=field) from error


def render_chat(
    services: Services,
    target: Target,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool | None,
    continue_final_message: bool | None = None,
    variables: Mapping[str, Any] | None,
) -> str:
    """The prompt of a conversation, by the target's chat template or else the base's; the target's own turns go in
    front. Raises ChatTemplateError."""
    chat = services.codec.chat(target.chat_template)
    known = chat.knows_tools
    documents = [tool.document() for tool in tools]
    turns: list[Mapping[str, Any]] = [_turn(message) for message in messages]
    if not known:
        turns = spell_out(turns, documents, system=chat.takes_system)
    return chat.render(
        templated_turns(target.template, turns),
        tools=documents if documents and known else None,
        add_generation_prompt=add_generation_prompt is not False and not continue_final_message,
        continue_final_message=bool(continue_final_message),
        **(variables or {}),
    )


def _turn(message: Message) -> dict[str, Any]:
    # `developer` is OpenAI's later name for `system`; templates know the earlier one.
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = message.content or ""
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            turn[key] = getattr(message, key)
    if message.tool_calls:
        # Templates write arguments out themselves, so they get them as objects.
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.parsed()},
            }
            for call in message.tool_calls
        ]
    return turn


def check_prompt(services: Services, prompt: Sequence[int], *, field: str) -> None:
    """Refuse an empty prompt and ids that are not in the vocabulary (those past it mean virtual tokens)."""
    if not prompt:
        raise InvalidRequestError("The prompt is empty: it has no tokens.", field=field)
    vocabulary = services.engine.info.vocab
    if max(prompt) >= vocabulary:
        raise InvalidRequestError(
            f"Token {max(prompt)} is not in the vocabulary of {vocabulary} tokens.", field=field
        )
