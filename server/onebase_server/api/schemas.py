"""The bodies of requests. Every field is checked and unknown ones are refused: nothing is silently ignored.

Names and meanings are OpenAI's, and vLLM's for what goes beyond.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from onebase_server.api.errors import InvalidRequestError

MOST_SEQUENCES = 1024
"""Sequences that one request may ask for: prompts times n."""


class Refused:
    """Why a field that clients know is refused here, and the values of it that ask for nothing."""

    def __init__(self, why: str, *neutral: Any) -> None:
        self.why = why
        self.neutral = (None, *neutral)


class Body(BaseModel):
    """Strict: a number sent as a string is an error, and so is a field that does not exist."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    refused: ClassVar[Mapping[str, Refused]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict) or cls.refused.keys().isdisjoint(data):
            return data
        for field, reason in cls.refused.items():
            if data.get(field) not in reason.neutral:
                raise InvalidRequestError(f"{field} is not supported: {reason.why}.", field=field)
        return {field: value for field, value in data.items() if field not in cls.refused}


def _is_token(value: Any) -> bool:
    return type(value) is int and value >= 0


def _prompts(value: Any) -> Any:
    """Any of OpenAI's four shapes to a list of strings or of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(map(_is_token, value)):
            return [value]
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(isinstance(prompt, list) and all(map(_is_token, prompt)) for prompt in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_keys(value: Any) -> Any:
    """JSON's object keys are strings; logit_bias's are token ids."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): bias for key, bias in value.items()}
    except (TypeError, ValueError) as error:
        raise ValueError("keys must be token ids") from error


def _text_of_parts(value: Any) -> Any:
    """A message's content: a string, or a list of text parts, which become lines as in vLLM."""
    if not isinstance(value, list):
        return value
    lines = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} must be {{'type': 'text', 'text': ...}}; got type {kind!r}")
        lines.append(part["text"])
    return "\n".join(lines)


_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}

Prompts = Annotated[list[str | list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[StopString], BeforeValidator(_one_or_more), Field(max_length=64)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[int, Bias], BeforeValidator(_token_keys)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
Text = Annotated[str, BeforeValidator(_text_of_parts)]


class StreamOptions(Body):
    """Extras of a stream."""

    include_usage: bool | None = None


class JsonSchema(Body):
    """What `response_format` says of a JSON schema."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """Accepted for compatibility: the schema is always followed."""


class ResponseFormat(Body):
    """What the output is: any text, a JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequestError(
                "json_schema goes with type 'json_schema', and with no other.", field="response_format.json_schema"
            )
        return self


def _schema_or_text(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema, or one as a string")
    return value


AnyJsonSchema = Annotated[Any, BeforeValidator(_schema_or_text), WithJsonSchema({"type": ["object", "string"]})]


class Generation(Body):
    """What completions and chats have in common. Null means the default everywhere, as some clients send it."""

    refused = {
        "service_tier": Refused("there is one tier", "auto", "default"),
        "metadata": Refused("completions are not stored", {}),
    }

    model: str | None = None
    """An adapter's name, or the base's; left out, it is the base."""
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops | None = None
    user: str | None = None
    """Accepted for compatibility; changes nothing."""

    # vLLM's.
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)

    response_format: ResponseFormat | None = None
    guided_json: AnyJsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=1000)
    guided_grammar: str | None = None
    """In llguidance's Lark notation."""

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true.", field="stream_options")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions."""

    refused = {
        **Generation.refused,
        "suffix": Refused("the base model does not fill in the middle", ""),
    }

    prompt: Prompts
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool | None = None


class CalledFunction(Body):
    """A function's name and arguments, in an earlier turn."""

    name: str
    arguments: str

    def parsed(self) -> Any:
        """The arguments, or their text where it is not JSON."""
        try:
            return json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments


class MessageToolCall(Body):
    """A call in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As streams have it; changes nothing."""


class Message(Body):
    """One turn of a conversation."""

    refused = {
        "refusal": Refused("leave it out"),
        "function_call": Refused("use tool_calls"),
        "audio": Refused("only text is read"),
        "annotations": Refused("leave it out", []),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a turn of role {self.role!r} has no tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required")
        return self


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

    type: Literal["function"]
    function: Function

    def document(self) -> dict[str, Any]:
        """As prompts show it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(Body):
    """A function by name."""

    name: str


class NamedTool(Body):
    """`tool_choice` for one function."""

    type: Literal["function"]
    function: FunctionName


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict):
        return NamedTool.model_validate(value)
    if value not in (None, "none", "auto", "required"):
        raise ValueError("must be 'none', 'auto', 'required', or {'type': 'function', 'function': {'name': ...}}")
    return value


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
    ]
}
ToolChoice = Annotated[Any, BeforeValidator(_tool_choice), WithJsonSchema(_TOOL_CHOICE_SCHEMA)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    refused = {
        **Generation.refused,
        "functions": Refused("use tools", []),
        "function_call": Refused("use tool_choice", "none", "auto"),
        "modalities": Refused("only text comes back", ["text"]),
        "audio": Refused("only text comes back"),
        "store": Refused("completions are not stored", False),
        "reasoning_effort": Refused("use chat_template_kwargs for what the base's template knows", "none"),
        "verbosity": Refused("the base has no such setting", "medium"),
        "prediction": Refused("leave it out"),
        "web_search_options": Refused("leave it out"),
        "chat_template": Refused("the base's own template is used"),
        "continue_final_message": Refused("leave it out", False),
    }

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    safety_identifier: str | None = None
    """Accepted for compatibility; changes nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError(
                "max_tokens and max_completion_tokens differ; send max_completion_tokens only.", field="max_tokens"
            )
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise InvalidRequestError("tool_choice needs tools.", field="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidRequestError(
                f"tool_choice names {self.tool_choice.function.name!r}; the tools are: {', '.join(names)}.",
                field="tool_choice",
            )
        if len(set(names)) < len(names):
            raise InvalidRequestError("Two tools have the same name.", field="tools")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", field="top_logprobs")
        return self


class PooledRequest(Body):
    """What embeddings and classifications have in common."""

    model: str | None = None
    input: Prompts
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    user: str | None = None
    """Accepted for compatibility; changes nothing."""


class EmbeddingRequest(PooledRequest):
    """POST /v1/embeddings."""

    refused = {"dimensions": Refused("an embedding has the base's width")}

    encoding_format: Literal["float", "base64"] | None = None
    add_special_tokens: bool | None = None


class ClassificationRequest(PooledRequest):
    """POST /v1/classify."""


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Send either prompt or messages.", field="prompt")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class RegisterFields(Body):
    """POST /v1/adapters, beside the uploaded files."""

    name: str
    replace: bool | None = None
    """Make a new version, and the current one, of a name that is taken."""


class RegisterRequest(RegisterFields):
    """POST /v1/adapters, for a folder that the server can read."""

    path: str = Field(min_length=1)


class VersionFields(Body):
    """POST /v1/adapters/{name}/versions, beside the uploaded files."""

    promote: bool | None = None
    """Make it the current version; default true."""


class VersionRequest(VersionFields):
    """POST /v1/adapters/{name}/versions, for a folder that the server can read."""

    path: str = Field(min_length=1)


class PromoteRequest(Body):
    """POST /v1/adapters/{name}/promote."""

    version: int = Field(ge=1, le=2**31 - 1)


class LoadLoraRequest(Body):
    """POST /v1/load_lora_adapter."""

    refused = {"base_model_name": Refused("there is one base")}

    lora_name: str
    lora_path: str = Field(min_length=1)
    load_inplace: bool | None = None


class UnloadLoraRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None
    """Accepted for compatibility; changes nothing."""
