"""Hard prompts: text around the prompt, and turns in front of a conversation. No weights: their file is empty."""

from onebase_adapters.errors import AdapterFormatError
from onebase_adapters.methods.source import Lowered, Source
from onebase_adapters.primitives import Template

_ROLES = ("system", "user", "assistant")


def lower(source: Source) -> Lowered:
    """`adapter_config.json`: `before` and `after` (strings), `messages` ([{role, content}, ...])."""
    source.refuse_others(set())
    before, after = source.config.get("before", ""), source.config.get("after", "")
    for field, text in (("before", before), ("after", after)):
        if not isinstance(text, str):
            raise AdapterFormatError(f"{field} must be a string.", field=field)
    messages = source.config.get("messages", [])
    if not isinstance(messages, list) or not all(map(_is_turn, messages)):
        raise AdapterFormatError(
            f"messages must be a list of {{role, content}}, role one of {', '.join(_ROLES)}.", field="messages"
        )
    if not (before or after or messages):
        raise AdapterFormatError("The template is empty: it changes nothing.", field="before")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages)
    return Lowered((Template(before, after, turns),))


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)
