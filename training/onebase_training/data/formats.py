"""Records to examples: the formats, how their columns are recognised, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onebase_adapters.errors import DataError
from onebase_training.data.examples import Example, Turn
from onebase_training.data.files import Record

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""As the server has them: `developer` is OpenAI's later name for `system`; templates know the earlier one."""


@dataclass(frozen=True)
class Format:
    """One layout of columns."""

    columns: str
    """For people."""
    fits: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Record], Example]


def recognise(record: Record, name: str | None = None) -> str:
    """The name of the format of `record`, or `name` if that is a format. Raises DataError."""
    if name is not None:
        if name not in FORMATS:
            raise DataError(f"No format {name!r}; there are {', '.join(FORMATS)}.", field="format")
        return name
    for candidate, layout in FORMATS.items():
        if layout.fits(record.columns):
            return candidate
    known = "; ".join(f"{key}: {layout.columns}" for key, layout in FORMATS.items())
    found = ", ".join(map(repr, record.columns)) or "none"
    raise record.error(f"no known format has these columns: {found}. The formats are {known}.")


def _chat(record: Record) -> Example:
    messages = record.columns.get("messages")
    if not isinstance(messages, list) or not messages:
        raise record.error("'messages' must be a list of messages.", field="messages")
    turns = tuple(_turn(record, message, f"messages[{at}]") for at, message in enumerate(messages))
    if not any(turn.role == "assistant" for turn in turns):
        raise record.error("no message is the assistant's: there is nothing to learn.", field="messages")
    return Example(record.line, turns, task=_task(record))


def _turn(record: Record, message: Any, field: str) -> Turn:
    if not isinstance(message, dict):
        raise record.error(f"{field} must be an object with 'role' and 'content'.", field=field)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise record.error(f"{field} has the role {role!r}; the roles are {', '.join(ROLES)}.", field=field)
    if message.get("tool_calls"):
        raise record.error(f"{field} has tool_calls, which cannot be learned yet.", field=field)
    if message.get("weight", 1) != 1:
        raise record.error(f"{field} has a weight; every assistant turn is learned.", field=field)
    return Turn(ROLES[role], _text(record, message.get("content"), f"{field}.content"))


def _prompt_completion(record: Record) -> Example:
    completion = _text(record, record.columns.get("completion"), "completion")
    if not completion:
        raise record.error("the completion is empty: there is nothing to learn.", field="completion")
    prompt = _text(record, record.columns.get("prompt"), "prompt")
    return Example(record.line, prompt=prompt, completion=completion, task=_task(record))


def _text(record: Record, value: Any, field: str) -> str:
    if value is None:
        raise record.error(f"{field} is missing or null.", field=field)
    if not isinstance(value, str):
        raise record.error(f"{field} must be text, found {type(value).__name__}.", field=field)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise record.error(
            f"{field} holds half of a surrogate pair (an escape such as \\ud83d alone).", field=field
        )
    return value


def _task(record: Record) -> str:
    value = record.columns.get("task")
    return "" if value is None else _text(record, value, "task")


FORMATS: dict[str, Format] = {
    "chat": Format("messages (a list of role, content)", lambda columns: "messages" in columns, _chat),
    "prompt-completion": Format(
        "prompt, completion",
        lambda columns: "prompt" in columns and "completion" in columns,
        _prompt_completion,
    ),
}
