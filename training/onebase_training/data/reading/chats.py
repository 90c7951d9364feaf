"""The formats that are chats: messages as OpenAI has them, ShareGPT's conversations, and Alpaca's instructions."""

from typing import Any

from onebase_training.data.examples import Example, Turn
from onebase_training.data.reading.cells import only_key, task, text
from onebase_training.data.reading.text_files import Record

OUTPUTS = ("output", "response")

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""As the server has them: `developer` is OpenAI's later name for `system`; templates know the earlier one."""
_SPEAKERS = {**_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def messages(record: Record) -> Example:
    """`messages`: [{role, content}, ...]."""
    return _chat(record, [_message(record, *item) for item in _listed(record, "messages")])


def sharegpt(record: Record) -> Example:
    """`conversations`: [{from, value}, ...] or as in `messages`; `system` beside them if any."""
    turns = _system(record)
    for field, item in _listed(record, "conversations"):
        if "from" not in item:
            turns.append(_message(record, field, item))
            continue
        speaker = item["from"]
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            known = ", ".join(_SPEAKERS)
            raise record.error(f"{field} is from {speaker!r}, which is none of {known}.", field=field)
        turns.append(Turn(_SPEAKERS[speaker], text(record, f"{field}.value", item.get("value"))))
    return _chat(record, turns)


def instruction(record: Record) -> Example:
    """`instruction`, `input` (may be empty or absent), `output`; `system` and `history` (pairs) if any."""
    asked, answer = text(record, "instruction"), text(record, only_key(record, OUTPUTS))
    if record.columns.get("input"):
        asked = f"{asked}\n\n{text(record, 'input')}"
    turns = _system(record)
    history = record.columns.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise record.error("history must be a list of pairs (instruction, output).", field="history")
    for earlier, reply in history:
        turns.append(Turn("user", text(record, "history", earlier)))
        turns.append(Turn("assistant", text(record, "history", reply)))
    return _chat(record, [*turns, Turn("user", asked), Turn("assistant", answer)])


def _chat(record: Record, turns: list[Turn]) -> Example:
    answers = [turn.content for turn in turns[1:] if turn.role == "assistant"]
    if not answers:
        raise record.error("no turn of the assistant answers another: there is nothing to learn.")
    if not all(answers):
        raise record.error("a turn of the assistant is empty: there is nothing to learn in it.")
    return Example(record.line, tuple(turns), task=task(record))


def _system(record: Record) -> list[Turn]:
    return [Turn("system", text(record, "system"))] if record.columns.get("system") else []


def _listed(record: Record, key: str) -> list[tuple[str, dict[str, Any]]]:
    value = record.columns.get(key)
    if not isinstance(value, list) or not value:
        raise record.error(f"{key} must be a list with something in it.", field=key)
    items = [(f"{key}[{at}]", item) for at, item in enumerate(value)]
    for field, item in items:
        if not isinstance(item, dict):
            raise record.error(f"{field} must be an object, found {type(item).__name__}.", field=field)
    return items


def _message(record: Record, field: str, message: dict[str, Any]) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise record.error(f"{field} has the role {role!r}, which is none of {', '.join(_ROLES)}.", field=field)
    if message.get("tool_calls"):
        raise record.error(f"{field} has tool_calls, which cannot be learned yet.", field=field)
    weight = message.get("weight")
    if weight is not None and weight != 1:
        raise record.error(f"{field} has the weight {weight}; every assistant turn is learned.", field=field)
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(_part(record, f"{field}.content[{at}]", part) for at, part in enumerate(content))
    return Turn(_ROLES[role], text(record, f"{field}.content", content))


def _part(record: Record, field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise record.error(f"{field} is not a part of the type 'text'.", field=field)
    return text(record, f"{field}.text", part.get("text"))
