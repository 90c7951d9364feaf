"""Bodies of /v1/responses."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from onebase_server.api.schemas.body import Body, Logprobs, Refused, Targeted, Text
from onebase_server.api.schemas.chat import Function, tool_choice
from onebase_server.api.schemas.generation import WITHOUT_EFFECT


class NamedFunction(Body):
    """`tool_choice` of a response for one function."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    """`tool_choice` of a response for some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedFunction] = Field(min_length=1, max_length=128)


def _response_tool_choice(value: Any) -> Any:
    if not isinstance(value, dict):
        return tool_choice(value)
    return (AllowedFunctions if value.get("type") == "allowed_tools" else NamedFunction).model_validate(value)


_RESPONSE_TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"], "type": "string"},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
        },
        {
            "type": "object",
            "required": ["type", "tools"],
            "properties": {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "minItems": 1, "items": {"type": "object"}},
            },
        },
        {"type": "null"},
    ]
}


class ResponseTool(Function):
    """A function that a response may call."""

    type: Literal["function"]


class ResponseInput(Body):
    """One item of a response's input: a message, a call, or what a call gave."""

    ignored: ClassVar[AbstractSet[str]] = {"id", "status", "phase"}

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }[self.type]
        own = {"role", "content", "call_id", "name", "arguments", "output"}
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"a {self.type} needs {field}")
        for field in sorted(own - set(needed)):
            if getattr(self, field) is not None:
                raise ValueError(f"a {self.type} has no {field}")
        return self


def _response_input(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


_RESPONSE_INPUT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}]
}


class TextFormat(Body):
    """How a response's text is."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted for compatibility: the schema is always followed."""


class TextOptions(Body):
    """`text` of a response."""

    refused: ClassVar[Mapping[str, Refused]] = {"verbosity": Refused("the base has no such setting", "medium")}

    format: TextFormat | None = None


class ResponsesRequest(Targeted):
    """POST /v1/responses."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "background": Refused("send stream: true to follow it", False),
        "context_management": Refused("leave it out", []),
        "conversation": Refused("nothing is stored; send the whole input"),
        "max_tool_calls": Refused("no tool runs on the server"),
        "previous_response_id": Refused("nothing is stored; send the whole input"),
        "prompt": Refused("no prompts are stored"),
    }
    ignored: ClassVar[AbstractSet[str]] = {
        *(WITHOUT_EFFECT - {"metadata", "user"}), "reasoning", "stream_options", "truncation"
    }  # fmt: skip
    """`truncation`, because what fits is never cut, and what does not is an error."""

    input: Annotated[
        list[ResponseInput],
        BeforeValidator(_response_input),
        Field(min_length=1),
        WithJsonSchema(_RESPONSE_INPUT_SCHEMA),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Annotated[
        Any, BeforeValidator(_response_tool_choice), WithJsonSchema(_RESPONSE_TOOL_CHOICE_SCHEMA)
    ] = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    """`message.output_text.logprobs`; there is nothing of the other kinds."""
    top_logprobs: Logprobs | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    """These two come back with the response, and change nothing else."""

    def text_format(self) -> TextFormat:
        """How its text is."""
        return (self.text.format if self.text is not None else None) or TextFormat.model_validate({})
