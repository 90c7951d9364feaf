"""Bodies of completions, and the fields that they share with chats."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import (
    Body,
    LogitBias,
    Penalty,
    Refused,
    Stops,
    Targeted,
    TokenId,
)
from onebase_server.logs import note_ignored

WITHOUT_EFFECT = frozenset({
    "metadata", "store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "request_id", "keep_alive",
})  # fmt: skip
"""Nothing is stored, caching needs no key, there is one tier, and a caller is known by its key."""


class StreamOptions(Body):
    """Extras of a stream."""

    ignored: ClassVar[AbstractSet[str]] = {"include_obfuscation", "continuous_usage_stats"}

    include_usage: bool | None = None


class JsonSchema(Body):
    """The JSON schema in `response_format`."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """The schema is always followed. false: what grammars cannot hold of it, such as `uniqueItems`, is left to the
    caller, and the reply's headers name it, where it is refused otherwise."""


class ResponseFormat(Body):
    """The form of the output: any text, a JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    """The schema of a `json_object`, as llama.cpp and Together have it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schema_ is not None and self.type != "json_object":
            raise InvalidRequestError(
                "schema goes with type 'json_object', and with no other.", field="response_format.schema"
            )
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


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


class StructuredOutputs(Body):
    """vLLM's later form of the `guided_` fields: one of these."""

    ignored: ClassVar[AbstractSet[str]] = {"disable_fallback"}

    json_: AnyJsonSchema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """In llguidance's Lark notation."""
    json_object: bool | None = None
    """Any JSON object."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(value is None for _, value in self):
            raise ValueError("needs one of json, regex, choice, grammar and json_object")
        return self


class Generation(Targeted):
    """The fields that completions and chats share. Null means the default everywhere, as some clients send it."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "use_beam_search": Refused("tokens are drawn, or the likeliest is taken", False),
        "length_penalty": Refused("there is no beam search", 1),
        "documents": Refused("write them into the prompt", []),
        "spaces_between_special_tokens": Refused("they stand as the tokenizer has them", True),
        "typical_p": Refused("use top_p or min_p", 1),
    }
    ignored: ClassVar[AbstractSet[str]] = WITHOUT_EFFECT | {"guided_decoding_backend"}

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

    # vLLM's.
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    """The prompt's tokens, and each choice's, come back beside the text."""
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)

    response_format: ResponseFormat | None = None
    guided_json: AnyJsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    """In llguidance's Lark notation."""
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            note_ignored("stream_options")
        return self
