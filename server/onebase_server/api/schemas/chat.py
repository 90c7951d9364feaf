"""Conversations and their tools."""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from onebase_engine.text.tool_text import tool_document
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import Body, Logprobs, Refused, Text
from onebase_server.api.schemas.generation import Generation


class CalledFunction(Body):
    """A function's name and arguments, in an earlier turn."""

    name: str
    arguments: str | dict[str, Any] | None = None

    def parsed(self) -> Any:
        """The arguments, or their text where it is not JSON; `{}` where there is nothing."""
        if not isinstance(self.arguments, str):
            return self.arguments or {}
        if not self.arguments.strip():
            return {}
        try:
            return json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments


def _as_many_as_fit(value: Any) -> Any:
    return None if value == -1 else value


MaxTokens = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_as_many_as_fit)]
"""-1, as some clients write it, is null: as many as fit."""


class MessageToolCall(Body):
    """A call in an earlier turn."""

    ignored: ClassVar[AbstractSet[str]] = {"provider_specific_fields", "extra_content", "cache_control"}

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As streams have it; changes nothing."""


class Message(Body):
    """One turn of a conversation."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "refusal": Refused("leave it out"),
        "function_call": Refused("use tool_calls"),
        "audio": Refused("only text is read"),
    }
    ignored: ClassVar[AbstractSet[str]] = {
        "reasoning_content", "reasoning", "reasoning_details", "thinking_blocks", "provider_specific_fields", "id",
        "annotations", "cache_control",
    }  # fmt: skip

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a turn of role {self.role!r} has no tool_calls")
        if self.content is None and self.role not in ("assistant", "tool"):
            raise ValueError("content is required")
        return self


Messages = Annotated[list[Message], Field(min_length=1, max_length=10_000)]


def _template_variables(value: dict[str, Any]) -> dict[str, Any]:
    taken = {"messages", "conversations", "chat_template", "add_generation_prompt", "continue_final_message"}
    taken |= {"tools", "documents", "return_assistant_tokens_mask"}
    if bad := sorted(taken & value.keys()):
        raise ValueError(f"may not set {', '.join(bad)}")
    return value


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_template_variables)]


class Function(Body):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """Whether calls follow the schema to the letter."""


class Tool(Body):
    """A tool: a function."""

    ignored: ClassVar[AbstractSet[str]] = {"cache_control"}

    type: Literal["function"]
    function: Function

    def document(self) -> dict[str, Any]:
        """As prompts show it."""
        return tool_document({"function": self.function.model_dump()})


class FunctionName(Body):
    """A function by name."""

    name: str


class NamedTool(Body):
    """`tool_choice` for one function."""

    type: Literal["function"]
    function: FunctionName


class AllowedSet(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = Field(min_length=1, max_length=128)


class AllowedTools(Body):
    """`tool_choice` for some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedSet


def tool_choice(value: Any) -> Any:
    """The three words, a NamedTool or AllowedTools. Raises ValueError."""
    if isinstance(value, dict):
        kind = AllowedTools if value.get("type") == "allowed_tools" else NamedTool
        return kind.model_validate(value)
    if value not in (None, "none", "auto", "required"):
        raise ValueError(
            "must be 'none', 'auto', 'required', {'type': 'function', 'function': {'name': ...}}, or "
            "{'type': 'allowed_tools', 'allowed_tools': {'mode': ..., 'tools': [...]}}"
        )
    return value


def chosen_names(choice: Any) -> AbstractSet[str]:
    """The functions that a `tool_choice` names."""
    if isinstance(choice, NamedTool):
        return {choice.function.name}
    return (
        {tool.function.name for tool in choice.allowed_tools.tools} if isinstance(choice, AllowedTools) else set()
    )


_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"], "type": "string"},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
        {
            "type": "object",
            "required": ["type", "allowed_tools"],
            "properties": {
                "type": {"const": "allowed_tools"},
                "allowed_tools": {
                    "type": "object",
                    "required": ["tools"],
                    "properties": {
                        "mode": {"enum": ["auto", "required"]},
                        "tools": {"type": "array", "minItems": 1, "items": {"type": "object"}},
                    },
                },
            },
        },
    ]
}
ToolChoice = Annotated[Any, BeforeValidator(tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **Generation.refused,
        "functions": Refused("use tools", []),
        "function_call": Refused("use tool_choice", "none", "auto"),
        "modalities": Refused("only text comes back", ["text"]),
        "audio": Refused("only text comes back"),
        "best_of": Refused("use n", 1),
        "echo": Refused("it is for completions", False),
        "enable_thinking": Refused("use chat_template_kwargs for what the base's template knows", False),
        "thinking": Refused("use chat_template_kwargs for what the base's template knows", {"type": "disabled"}),
        "verbosity": Refused("the base has no such setting", "medium"),
        "prediction": Refused("leave it out"),
        "web_search_options": Refused("leave it out"),
        "chat_template": Refused("the base's own template is used"),
    }
    ignored: ClassVar[AbstractSet[str]] = Generation.ignored | {"reasoning_effort", "include"}

    messages: Messages
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: MaxTokens = None
    max_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on with the last message, the assistant's, instead of answering it."""
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens differ; send max_completion_tokens only.", field="max_tokens"
            )
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise InvalidRequestError("tool_choice needs tools.", field="tool_choice")
        for wanted in sorted(chosen_names(self.tool_choice) - set(names)):
            raise InvalidRequestError(
                f"tool_choice names {wanted!r}; the tools are: {', '.join(names)}.", field="tool_choice"
            )
        if len(set(names)) < len(names):
            raise InvalidRequestError("Two tools have the same name.", field="tools")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message goes with add_generation_prompt: false.", field="add_generation_prompt"
                )
            if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
                raise InvalidRequestError(
                    "continue_final_message needs a text of the assistant's as the last message.",
                    field="continue_final_message",
                )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", field="top_logprobs")
        return self
