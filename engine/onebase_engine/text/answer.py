"""One sequence of a response as it grows: the engine's outputs become text, counts and an ending."""

from collections.abc import Sequence

from onebase_adapters.errors import OneBaseError
from onebase_engine.request import EngineRequest, FinishReason, Output, TokenLogprobs
from onebase_engine.text.stop_strings import OutputText


class GenerationError(OneBaseError):
    """The engine ended an accepted request without an answer. `kind` is the output's `error_kind`."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message, field="adapters" if kind == "composition" else None)
        self.kind = kind


def generation_error(output: Output) -> GenerationError:
    """The error for an Output that ends a request with `error` or `abort`."""
    if output.finish_reason == "abort":
        return GenerationError("The server is shutting down.", kind="shutting_down")
    return GenerationError(output.error or "The engine failed.", kind=output.error_kind or "internal")


class Answer:
    """A request to the engine, and what has come of it so far."""

    __slots__ = (
        "cached_tokens",
        "completion_tokens",
        "finish_reason",
        "index",
        "new_logprobs",
        "new_tokens",
        "prompt_logprobs",
        "request",
        "stop_reason",
        "text",
    )

    def __init__(self, index: int, request: EngineRequest, text: OutputText) -> None:
        self.index = index
        self.request = request
        self.text = text
        self.completion_tokens = 0
        """All that were generated for it: those that a stop string cut off, and the end-of-sequence token, too."""
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.new_logprobs: Sequence[TokenLogprobs] = ()
        """Those of the tokens in the latest output."""
        self.new_tokens: Sequence[int] = ()
        """The latest output's tokens, without those that a stop string cut off."""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        """The stop string or stop token that ended it (vLLM's field); None for the model's own end."""

    def take(self, output: Output) -> str:
        """Add an output; returns the text that may now be shown. Raises GenerationError if it is a bad ending."""
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        before = self.text.tokens
        shown = self.text.push(output.tokens) if output.tokens else ""
        self.new_tokens = output.tokens[: self.text.tokens - before]
        if output.logprobs:
            self.new_logprobs = output.logprobs[: self.text.tokens - before]
        else:
            self.new_logprobs = ()
        self.completion_tokens = self.text.tokens
        reason = output.finish_reason
        if reason is not None and self.text.stop is None:
            if reason not in ("stop", "length"):
                raise generation_error(output)
            shown += self.text.finish()
            self.finish_reason = reason
            if output.stop_token is not None:
                self.completion_tokens += 1
                if output.stop_token in self.request.sampling.stop_token_ids:
                    self.stop_reason = output.stop_token
        if self.text.stop is not None:
            self.finish_reason = "stop"
            self.stop_reason = self.text.stop
        return shown
