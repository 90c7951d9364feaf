"""Hard prompts: text around the prompt, turns in front of a conversation, and what ends an answer. No weights:
their file is empty."""

from collections.abc import Mapping
from typing import Any

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.lowering.source import Lowered, Source
from onebase_adapters.primitives.instruction_set import Template

_ROLES = ("system", "user", "assistant")


def lower(source: Source) -> Lowered:
    """Everything is in `adapter_config.json`: see `read_template`."""
    source.refuse_others(set())
    template = read_template(source.config)
    if template == Template():
        raise AdapterFormatError("The template is empty: it changes nothing.", field="before")
    return Lowered((template,))


def read_template(config: Mapping[str, Any]) -> Template:
    """From `before` and `after` (strings), `messages` ([{role, content}, ...]) and `stop` (strings), all optional.

    Raises AdapterFormatError."""
    for field in ("before", "after"):
        if not isinstance(config.get(field, ""), str):
            raise AdapterFormatError(f"{field} must be a string.", field=field)
    messages = config.get("messages", [])
    if not isinstance(messages, list) or not all(map(_is_turn, messages)):
        raise AdapterFormatError(
            f"messages must be a list of {{role, content}}, role one of {', '.join(_ROLES)}.", field="messages"
        )
    stop = config.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise AdapterFormatError("stop must be a list of strings, none of them empty.", field="stop")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
    return Template(config.get("before", ""), config.get("after", ""), turns, tuple(stop))


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)
