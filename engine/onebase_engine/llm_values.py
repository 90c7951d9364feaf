"""What `LLM` is asked for and what it answers: plain values in the shapes of vLLM's offline LLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from msgspec.structs import force_setattr

from onebase_adapters.errors import ConfigError
from onebase_engine import request
from onebase_engine.request import FinishReason, TokenLogprobs


class SamplingParams(request.SamplingParams, frozen=True, kw_only=True):
    """How to choose tokens, and where the text ends. Checked when it is made: raises ConfigError."""

    n: int = 1
    """Sequences for each prompt. With a seed each of them has one of its own."""
    stop: str | Sequence[str] = ()
    """The text ends before the first of these."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        force_setattr(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids))
        force_setattr(self, "top_k", max(self.top_k, 0) if self.top_k >= -1 else self.top_k)  # -1 is vLLM's "off"
        penalties = ("presence_penalty", "frequency_penalty")
        wrong = {
            "n": self.n < 1 and "at least 1",
            "stop": not all(self.stop) and "texts, none of them empty",
            "max_tokens": self.max_tokens < 1 and "at least 1",
            "min_tokens": not 0 <= self.min_tokens <= self.max_tokens and "between 0 and max_tokens",
            "temperature": not 0 <= self.temperature <= 100 and "between 0 and 100",
            "top_p": not 0 < self.top_p <= 1 and "above 0 and at most 1",
            "top_k": self.top_k < 0 and "at least 0, which is off",
            "min_p": not 0 <= self.min_p <= 1 and "between 0 and 1",
            "repetition_penalty": not 0 < self.repetition_penalty <= 100 and "above 0 and at most 100",
            **{name: not -2 <= getattr(self, name) <= 2 and "between -2 and 2" for name in penalties},
            "logit_bias": not all(map(isfinite, self.logit_bias.values())) and "finite numbers by token",
            "seed": self.seed is not None and not -(2**63) <= self.seed < 2**63 and "within 64 bits",
            "logprobs": (self.logprobs or 0) < 0 and "at least 0, or None",
            "prompt_logprobs": (self.prompt_logprobs or 0) < 0 and "at least 0, or None",
        }
        for name, must in wrong.items():
            if must:
                raise ConfigError(f"{name} must be {must}, not {getattr(self, name)!r}.", field=name)


@dataclass(frozen=True)
class CompletionOutput:
    """One sequence that was generated."""

    index: int
    """Which of the prompt's `n`."""
    text: str
    token_ids: tuple[int, ...]
    """Those that a stop string cut off, too; without the token that ended it."""
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or stop token that ended it; None for the model's own end."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """For each of `token_ids`, if asked for."""


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one prompt."""

    prompt: str | None
    """As the model has read it, with the adapter's template; None if it was given as tokens."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    adapter: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """If asked for; the first is None."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache."""


@dataclass(frozen=True)
class ClassificationOutput:
    """What an adapter's head says of a text, or of each of its tokens."""

    prompt_token_ids: tuple[int, ...]
    labels: tuple[str, ...]
    """The head's, in the order of the probabilities."""
    probabilities: tuple[tuple[float, ...], ...]
    """One row for a text, or one for each token."""

    @property
    def best(self) -> tuple[str, ...]:
        """The most likely label of each row."""
        return tuple(self.labels[row.index(max(row))] for row in self.probabilities)


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a continuation is after a prompt."""

    logprob: float
    """The whole continuation's: the sum of its tokens'."""
    token_ids: tuple[int, ...]
    """The continuation's."""
    logprobs: tuple[TokenLogprobs, ...]
    """For each of `token_ids`."""
