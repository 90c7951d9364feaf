"""Functions that a model may call: how the prompt tells of them, the grammar of a call, and calls in the output.

A call is written as Hermes and Qwen do, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; an output that
is nothing but such JSON counts, too.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from onebase_server.api.schemas.chat import AllowedTools, ChatRequest, Message, NamedTool, Tool, chosen_names

# As people and json.dumps write it, and no more: a small model gets lost in white space (tried: with up to 40
# characters of it anywhere, SmolLM2-135M wrote newlines until its tokens were spent).
SPACES = {"whitespace_pattern": r" |\n[ \t]{0,24}"}
"""For the grammar of any JSON."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# Without an example: small models copy its words into their calls.
_INSTRUCTIONS = """You can call functions. These are at hand, one a line:
<tools>
{tools}
</tools>
To call a function, write <tool_call>, then a JSON object whose "name" is the function's name and whose
"arguments" are an object by the function's "parameters", then </tool_call>."""


@dataclass(frozen=True)
class ToolCall:
    """One call that the model made."""

    id: str
    name: str
    arguments: str
    """JSON."""

    def document(self) -> dict[str, Any]:
        """As OpenAI's message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def tools_of(body: ChatRequest) -> Sequence[Tool]:
    """Those that the model is told of: none where `tool_choice` is `none`, some where it is `allowed_tools`."""
    tools = () if body.tool_choice == "none" else body.tools or ()
    if isinstance(body.tool_choice, AllowedTools):
        return [tool for tool in tools if tool.function.name in chosen_names(body.tool_choice)]
    return tools


def instructions(tools: Sequence[Tool]) -> str:
    """What a system turn says of the tools, for a base whose chat template does not."""
    return _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool.document(), ensure_ascii=False) for tool in tools))


def spelled_out(message: Message) -> dict[str, Any]:
    """A turn with calls, or a call's result, as text: for a base whose chat template knows neither."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content or ''}\n</tool_response>"}
    parts = [message.content] if message.content else []
    for call in message.tool_calls or ():
        document = {"name": call.function.name, "arguments": call.function.parsed()}
        parts.append(f"{_OPEN}\n{json.dumps(document, ensure_ascii=False)}\n{_CLOSE}")
    return {"role": message.role, "content": "\n".join(parts)}


@dataclass(frozen=True)
class CallRules:
    """What a body asks of calls beyond their form."""

    forced: bool
    """Whether there has to be one: then nothing else is shown, and a call that was made already ends the answer."""
    one: bool
    """Whether the first ends the answer."""

    @classmethod
    def of(cls, body: ChatRequest) -> "CallRules":
        """A body's."""
        choice = body.tool_choice
        named = isinstance(choice, NamedTool)
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        return cls(named or mode == "required", named or body.parallel_tool_calls is False)


def tool_grammar(body: ChatRequest, final: str | None) -> str | None:
    """The grammar that a body's tools make necessary, if any: calls that have to be made, have to be exact, or are
    not to be more than one. `final` is what an answer without calls has to follow: the right side of a rule in
    Lark's notation."""
    tools = tools_of(body)
    if isinstance(body.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name in chosen_names(body.tool_choice)]
    rules = CallRules.of(body)
    forced, several = rules.forced, not rules.one
    if not tools or not (forced or final or not several or any(tool.function.strict for tool in tools)):
        return None
    lines = [f"function: %json {json.dumps(_call_schema(tools))}"]
    if forced or final is not None:
        calls = "call+" if several else "call"
        lines += [
            f"start: {calls}" if forced else f"start: {calls} | final",
            f'call: "\\n"? {json.dumps(_OPEN)} "\\n" function "\\n" {json.dumps(_CLOSE)}',
        ]
        if not forced:
            lines.append(f"final: {final}")
    else:
        lines += [
            "start: call* TEXT" if several else "start: TEXT | call",
            f'call: head "\\n" function "\\n" {json.dumps(_CLOSE)}',
            # Lazy: the tag ends the text, whatever else could be made of it.
            f"head[lazy]: TEXT {json.dumps(_OPEN)}",
            r"TEXT: /(.|\n)*/",
        ]
    return LLMatcher.grammar_from_lark("\n".join(lines))


def _call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    options = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _arguments_schema(tool.function.parameters or {}),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    # What a schema says beyond what grammars can hold is the caller's to check, unless it asks for `strict`.
    lenient = not any(tool.function.strict for tool in tools)
    return {"anyOf": options, "x-guidance": {**SPACES, "lenient": lenient}}


_OPEN_OBJECT = {"additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref", "not"}


def _arguments_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """A model invents no arguments: a function takes those that its schema names, and without any it takes `{}`."""
    if _OPEN_OBJECT & parameters.keys():
        return parameters
    return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}


class ToolParser:
    """Reads an output in pieces of any size: the same calls and the same text, however it is cut.

    What may be the beginning of a call is held back. What looks like a call and is none, because its JSON is broken
    or its function unknown, stays text.
    """

    def __init__(self, tools: Sequence[Tool], rules: CallRules) -> None:
        self._names = frozenset(tool.function.name for tool in tools)
        self._rules = rules
        self._made: set[tuple[str, str]] = set()
        self.over = False
        """Whether the answer has all the calls that it may have: nothing more is read."""
        self._held = ""
        self._state: str = "start"
        """`start`: nothing but space yet; `json`: perhaps one large call; `text`; `call`: within the tags."""
        self.calls = 0
        """How many there have been."""

    def push(self, text: str) -> list[str | ToolCall]:
        """What can be told now."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._advance(found):
            pass
        return self._ruled(found)

    def finish(self, *, cut_off: bool = False) -> list[str | ToolCall]:
        """What was held back, once no more text comes; `cut_off`: because of a limit, so that a call that has begun
        is none, and no text either."""
        return self._ruled(self._rest(cut_off=cut_off))

    def _ruled(self, found: list[str | ToolCall]) -> list[str | ToolCall]:
        """As far as the rules let it be shown."""
        shown: list[str | ToolCall] = []
        for part in found:
            if self.over or (self._rules.forced and isinstance(part, str)):
                continue
            if isinstance(part, ToolCall):
                made = (part.name, part.arguments)
                repeated = self._rules.forced and made in self._made
                self._made.add(made)
                self.over = self._rules.one or repeated
                if repeated:
                    continue
            shown.append(part)
        return shown

    def _rest(self, *, cut_off: bool) -> list[str | ToolCall]:
        rest, self._held = self._held, ""
        if self._state == "json":
            calls = self._parse_all(rest)
        elif self._state == "call":  # the closing tag is missing
            calls = self._parse_all(rest)
            rest = "" if cut_off else _OPEN + rest
        else:
            calls = []
            if cut_off and self._state == "text":
                rest = rest.partition("<")[0]
        if calls:
            self.calls += len(calls)
            return [*calls]
        return [rest] if rest and not (self.calls and rest.isspace()) else []

    def _advance(self, found: list[str | ToolCall]) -> bool:
        """One change of state; false where more text is needed."""
        match self._state:
            case "start":
                first = self._held.lstrip()[:1]
                if not first:
                    return False
                self._state = "json" if first in "{[" else "text"
                return True
            case "text":
                before, tag, after = self._held.partition(_OPEN)
                if not tag:
                    keep = _may_open_a_call(self._held)
                    shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                    found += [shown] if shown else []
                    return False
                found += [before.rstrip()] if before.rstrip() else []
                self._held, self._state = after, "call"
                return True
            case "call":
                inside, tag, after = self._held.partition(_CLOSE)
                if not tag:
                    return False
                calls = self._parse_all(inside)
                self.calls += len(calls)
                found += calls or [_OPEN + inside + _CLOSE]
                self._held, self._state = after, "text"
                return True
        return False

    def _parse_all(self, text: str) -> list[ToolCall]:
        """The call, or the list of calls, that a text is; empty if it is anything else."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            return []
        documents = document if isinstance(document, list) else [document]
        calls = [self._parse(one) for one in documents]
        return [call for call in calls if call is not None] if all(calls) else []

    def _parse(self, document: Any) -> ToolCall | None:
        if not isinstance(document, dict) or document.get("name") not in self._names:
            return None
        arguments = document.get("arguments", document.get("parameters")) or {}
        if not isinstance(arguments, dict):
            return None
        return ToolCall(
            f"call_{uuid.uuid4().hex[:24]}", document["name"], json.dumps(arguments, ensure_ascii=False)
        )


def _may_open_a_call(text: str) -> int:
    """Length of the end of `text` that may be space in front of a call, and the first letters of its tag."""
    tag = next((n for n in range(min(len(text), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(text[-n:])), 0)
    before = text[: len(text) - tag]
    return len(before) - len(before.rstrip()) + tag
