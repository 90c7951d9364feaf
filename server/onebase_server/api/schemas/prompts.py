"""Bodies of the endpoints that read prompts and generate nothing."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from onebase_server.api.errors import InvalidRequestError
from onebase_server.api.schemas.base import Body, Prompts, Refused, Targeted, TokenId
from onebase_server.api.schemas.chat import Message, TemplateVariables


class PooledRequest(Targeted):
    """What embeddings and classifications have in common."""

    input: Prompts
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    user: str | None = None
    """Accepted for compatibility; changes nothing."""


class EmbeddingRequest(PooledRequest):
    """POST /v1/embeddings."""

    refused: ClassVar[Mapping[str, Refused]] = {"dimensions": Refused("an embedding has the base's width")}

    encoding_format: Literal["float", "base64"] | None = None
    add_special_tokens: bool | None = None


class ClassificationRequest(PooledRequest):
    """POST /v1/classify."""


class TokenizeRequest(Targeted):
    """POST /tokenize: a prompt, or a conversation."""

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
