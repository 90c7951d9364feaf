"""Bodies of /v1/completions."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from onebase_server.api.schemas.body import Logprobs, Prompts, Refused
from onebase_server.api.schemas.generation import Generation


class CompletionRequest(Generation):
    """POST /v1/completions."""

    refused: ClassVar[Mapping[str, Refused]] = {
        **Generation.refused,
        "suffix": Refused("the base model does not fill in the middle", ""),
    }

    max_tokens: int | None = Field(None, ge=-1)
    """16 without it, as OpenAI has it; -1 is as many as fit."""
    prompt: Prompts
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    add_special_tokens: bool | None = None
