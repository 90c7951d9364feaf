"""Bodies of /tokenize and /detokenize."""

from typing import Self

from pydantic import Field, model_validator

from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import MOST_TOKENS, Body, Targeted, TokenId
from onebase_server.api.schemas.chat import Messages, TemplateVariables


class TokenizeRequest(Targeted):
    """POST /tokenize: a prompt, or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
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
    tokens: list[TokenId] = Field(max_length=MOST_TOKENS)
