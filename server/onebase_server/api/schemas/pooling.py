"""Bodies of the endpoints that read prompts and generate nothing."""

from collections.abc import Set as AbstractSet
from typing import ClassVar, Literal

from pydantic import Field

from onebase_server.api.schemas.body import Prompts, Targeted
from onebase_server.api.schemas.generation import WITHOUT_EFFECT


class PooledRequest(Targeted):
    """The fields that embeddings and classifications share."""

    ignored: ClassVar[AbstractSet[str]] = WITHOUT_EFFECT

    input: Prompts
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)


class EmbeddingRequest(PooledRequest):
    """POST /v1/embeddings."""

    dimensions: int | None = Field(None, ge=1)
    """Keep the first so many numbers, made of length 1 again; at most the base's width."""
    encoding_format: Literal["float", "base64"] | None = None
    add_special_tokens: bool | None = None


class ClassificationRequest(PooledRequest):
    """POST /v1/classify."""
