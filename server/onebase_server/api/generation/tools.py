"""Functions that a model may call: the grammar of a call, and calls in the output, as `text/tool_text.py` writes
them; an output that is nothing but such JSON counts, too."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from onebase_engine.text.tool_text import CLOSE, OPEN
from onebase_server.api.schemas.chat import AllowedTools, ChatRequest, NamedTool, Tool, chosen_names

# As people and json.dumps write it, and no more: a small model gets lost in white space (tried: with up to 40
# characters of it anywhere, SmolLM2-135M wrote newlines until its tokens were spent).
SPACES = {"whitespace_pattern": r" |\n[ \t]{0,24}"}
"""For the grammar of any JSON."""


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


@dataclass(frozen=True)
class CallRules:
    """The demands that a body makes on calls beyond their form."""

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
            f'call: "\\n"? {json.dumps(OPEN)} "\\n" function "\\n" {json.dumps(CLOSE)}',
        ]
        if not forced:
            lines.append(f"final: {final}")
    else:
        lines += [
            "start: call* TEXT" if several else "start: TEXT | call",
            f'call: head "\\n" function "\\n" {json.dumps(CLOSE)}',
            # Lazy: the tag ends the text, whatever else could be made of it.
            f"head[lazy]: TEXT {json.dumps(OPEN)}",
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
        """Take more of the output, and return the text and the calls that can be told now."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._advance(found):
            pass
        return self._ruled(found)

    def finish(self, *, cut_off: bool = False) -> list[str | ToolCall]:
        """Return what was held back, once no more text comes; `cut_off`: because of a limit, so that a call that
        has begun is none, and no text either."""
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
            rest = "" if cut_off else OPEN + rest
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
                before, tag, after = self._held.partition(OPEN)
                if not tag:
                    keep = _may_open_a_call(self._held)
                    shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                    found += [shown] if shown else []
                    return False
                found += [before.rstrip()] if before.rstrip() else []
                self._held, self._state = after, "call"
                return True
            case "call":
                inside, tag, after = self._held.partition(CLOSE)
                if not tag:
                    return False
                calls = self._parse_all(inside)
                self.calls += len(calls)
                found += calls or [OPEN + inside + CLOSE]
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
    tag = next((n for n in range(min(len(text), len(OPEN) - 1), 0, -1) if OPEN.startswith(text[-n:])), 0)
    before = text[: len(text) - tag]
    return len(before) - len(before.rstrip()) + tag
