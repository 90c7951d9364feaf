"""Tools, their calls and what these gave, written out as text for bases whose chat template knows none of it.

Training and serving both make their prompts by it, so that a model is asked as it was taught. A call is written as
Hermes and Qwen do: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from onebase_engine.text.hard_prompt import one_system_turn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Turn = Mapping[str, Any]

# Without an example: small models copy its words into their calls.
_INSTRUCTIONS = """You can call functions. These are at hand, one a line:
<tools>
{tools}
</tools>
To call a function, write <tool_call>, then a JSON object whose "name" is the function's name and whose
"arguments" are an object by the function's "parameters", then </tool_call>."""


def tool_document(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as prompts show it, whatever else is said of it: name, description and parameters, in this order."""
    function = tool["function"]
    shown = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
    return {"type": "function", "function": shown}


def spell_out(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], *, system: bool) -> list[Turn]:
    """A conversation in words alone. The tools go into its system turn, or where the template takes none (not
    `system`) into the first of the user's. Turns are {role, content, tool_calls}; a call's arguments an object."""
    said = [_spelled_out(turn) for turn in turns]
    if not tools:
        return said
    listed = "\n".join(json.dumps(tool_document(tool), ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed)
    if system:
        return one_system_turn([*said, {"role": "system", "content": text}])
    first = next((n for n, turn in enumerate(said) if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": text}, *said]
    told = {**said[first], "content": f"{text}\n\n{said[first]['content']}"}
    return [*said[:first], told, *said[first + 1 :]]


def _spelled_out(turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content'] or ''}\n</tool_response>"}
    if not turn.get("tool_calls"):
        return turn
    parts = [turn["content"]] if turn["content"] else []
    for call in turn["tool_calls"]:
        document = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        parts.append(f"{OPEN}\n{json.dumps(document, ensure_ascii=False)}\n{CLOSE}")
    return {"role": turn["role"], "content": "\n".join(parts)}
