"""The formats that are chats: messages as OpenAI has them, ShareGPT's conversations, TRL's prompts and completions
that are messages, and Alpaca's instructions."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from onebase_engine.text.message_parts import joined
from onebase_training.data.examples import Example, Turn
from onebase_training.data.reading.cells import listed, only_key, optional, task, text
from onebase_training.data.reading.text_files import Record

CONVERSATIONS = ("conversations", "conversation")
OUTPUTS = ("output", "response")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""As the server has them: `developer` is OpenAI's later name for `system`; templates know the earlier one."""
_SPEAKERS = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_CARRIED = ("tool_calls", "tool_call_id", "name")
"""Fields of a message that templates read beside its text."""
_MASKS = ("weight", "train", "loss")
"""By which of a message's fields people say that a turn is not to be learned."""
_READ = {"role", "content", "from", "value", *_CARRIED, *_MASKS}


def messages(record: Record) -> Example:
    """`messages`: [{role, content}, ...]; `system` and `tools` beside them if any."""
    return chat(record, [*system(record), *(_message(record, *item) for item in _objects(record, "messages"))])


def sharegpt(record: Record) -> Example:
    """`conversations`: [{from, value}, ...] or as in `messages`; `system` and `tools` beside them if any."""
    turns = system(record)
    for field, item in _objects(record, only_key(record, CONVERSATIONS)):
        turns.append(_said(record, field, item) if "from" in item else _message(record, field, item))
    return chat(record, turns)


def prompt_and_completion(record: Record) -> Example:
    """`prompt` and `completion`, both as `messages`: what the prompt says already is not learned."""
    asked = [_message(record, *item) for item in _objects(record, "prompt")]
    said = [_message(record, *item) for item in _objects(record, "completion")]
    return chat(record, [*(replace(turn, learned=turn.role != "assistant") for turn in asked), *said])


def instruction(record: Record) -> Example:
    """`instruction`, `input` (may be empty or absent), `output`; `system` and `history` (pairs) if any."""
    asked, answer = text(record, "instruction"), text(record, only_key(record, OUTPUTS))
    if context := optional(record, CONTEXTS):
        asked = f"{asked}\n\n{context}"
    turns = system(record)
    history = record.value("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise record.error("history must be a list of pairs (instruction, output).", field="history")
    for earlier, reply in history:
        turns.append(Turn("user", text(record, "history", earlier)))
        turns.append(Turn("assistant", text(record, "history", reply)))
    return chat(record, [*turns, Turn("user", asked), Turn("assistant", answer)])


def chat(record: Record, turns: list[Turn]) -> Example:
    """The example of these turns. Raises DataError where nothing in them can be learned."""
    answers = [turn for turn in turns[1:] if turn.answers]
    if not answers:
        masked = any(turn.role == "assistant" for turn in turns[1:])
        why = "that is to be learned answers" if masked else "answers"
        raise record.error(f"no turn of the assistant {why} another: there is nothing to learn.")
    if not all(turn.content or turn.fields.get("tool_calls") for turn in answers):
        raise record.error("a turn of the assistant is empty: there is nothing to learn in it.")
    return Example(record.line, tuple(turns), tools=_tools(record), task=task(record))


def system(record: Record) -> list[Turn]:
    """The system turn of a column beside the conversation, if there is one."""
    said = optional(record, SYSTEMS)
    return [Turn("system", said)] if said else []


def _objects(record: Record, key: str) -> list[tuple[str, dict[str, Any]]]:
    items = [(f"{key}[{at}]", item) for at, item in enumerate(listed(record, key))]
    for field, item in items:
        if not isinstance(item, dict):
            raise record.error(f"{field} must be an object, found {type(item).__name__}.", field=field)
        if key != "tools":
            record.pass_over(f"{key}[].{name}" for name, value in item.items() if name not in _READ and value)
    return items


def _said(record: Record, field: str, item: dict[str, Any]) -> Turn:
    speaker = item["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise record.error(f"{field} is from {speaker!r}, which is none of {known}.", field=field)
    said = text(record, f"{field}.value", item.get("value"))
    if speaker != "function_call":
        return Turn(_SPEAKERS[speaker], said, _learned(record, field, item), _fields(record, field, item))
    try:
        function = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise record.error(f"{field}.value is no call as JSON: {error}.", field=field) from error
    calls = _fields(record, field, {"tool_calls": [{"function": function}]})
    return Turn("assistant", "", _learned(record, field, item), calls)


def _message(record: Record, field: str, message: dict[str, Any]) -> Turn:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise record.error(f"{field} has the role {role!r}, which is none of {', '.join(_ROLES)}.", field=field)
    fields = _fields(record, field, message)
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts
        content = joined(_part(record, f"{field}.content[{at}]", part) for at, part in enumerate(content))
    if content is None and fields.get("tool_calls"):
        content = ""
    return Turn(_ROLES[role], text(record, f"{field}.content", content), _learned(record, field, message), fields)


def _learned(record: Record, field: str, message: dict[str, Any]) -> bool:
    for name in _MASKS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise record.error(f"{field}.{name} is {value!r}: a turn is learned (1) or not (0).", field=field)
    return all(message.get(name) in (None, 1) for name in _MASKS)


def _fields(record: Record, field: str, message: dict[str, Any]) -> dict[str, Any]:
    found = {name: message[name] for name in _CARRIED if message.get(name)}
    if "tool_calls" in found:
        found["tool_calls"] = [_call(record, f"{field}.tool_calls", call) for call in found["tool_calls"]]
    return found


def _call(record: Record, field: str, call: Any) -> dict[str, Any]:
    """With its arguments as an object, since templates write them out themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise record.error(f"{field} must hold functions with a name and arguments.", field=field)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise record.error(f"{field}: the arguments are no JSON: {error}.", field=field) from error
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _tools(record: Record) -> tuple[Mapping[str, Any], ...]:
    if record.value("tools") in (None, "", "[]", []):
        return ()
    tools = tuple(tool for _, tool in _objects(record, "tools"))
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _part(record: Record, field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise record.error(f"{field} is not a part of the type 'text'.", field=field)
    return text(record, f"{field}.text", part.get("text"))
