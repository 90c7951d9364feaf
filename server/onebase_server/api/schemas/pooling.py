"""Bodies of the endpoints that read prompts and generate nothing."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from onebase_server.api.schemas.body import Prompts, Refused, Targeted


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
