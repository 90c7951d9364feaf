"""What a request asks of the engine, in tokens. Plain values, shared by the API's side and the engine's."""

from typing import Literal, Self

import msgspec
from msgspec.structs import replace

FinishReason = Literal["stop", "length", "abort", "error"]
Task = Literal["generate", "classify", "embed", "score"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose a request's tokens. Names and meanings are vLLM's and OpenAI's."""

    max_tokens: int = 16
    """Most tokens to generate; at least 1."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """With a seed the tokens are the same in every run and any company."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no logprobs; n: the chosen token's, and those of the n most likely."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens (the first has none)."""
    grammar: str | None = None
    """A grammar for the output, as llguidance writes it; the end is chosen where the grammar allows it."""

    def of_choice(self, number: int) -> Self:
        """For one of several sequences of a prompt: of a seed each has its own, so that they differ and can be had
        again."""
        if self.seed is None or not number:
            return self
        # Within 64 bits, as the engine takes it.
        return replace(self, seed=(self.seed + number + 2**63) % 2**64 - 2**63)


class Part(msgspec.Struct, frozen=True):
    """One of the adapters that a request composes."""

    digest: str
    weight: float
    name: str
    """For messages."""


class EngineRequest(msgspec.Struct, frozen=True):
    """One sequence to continue."""

    id: str
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    sampling: SamplingParams
    adapter: str | None = None
    """Digest of a loaded adapter, or of a composition of several; None is the base."""
    tenant: str = ""
    """Whose request it is: tenants share the engine fairly, and share no cached prefix."""
    priority: int = 0
    """Lower runs first."""
    task: Task = "generate"
    """`classify`: the adapter's head reads the prompt; `embed`: its mean last hidden state, of length 1; `score`:
    the log-probabilities of the last `scored` tokens, and of `prompt_logprobs` others at each place. None of them
    generates anything, and `sampling` says nothing else to them."""
    parts: tuple[Part, ...] = ()
    """The loaded adapters that are composed."""
    said: int = 0
    """How many of the prompt's last tokens answer the others: virtual tokens stand as if they were not there, and
    an encoder-decoder's decoder has them."""
    scored: int = 0
    """How many of the prompt's last tokens a `score` is about: fewer than all."""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Digests of the loaded adapters that it needs."""
        if self.parts:
            return tuple(part.digest for part in self.parts)
        return () if self.adapter is None else (self.adapter,)

    @property
    def most_tokens(self) -> int:
        """Most tokens to generate."""
        return self.sampling.max_tokens if self.task == "generate" else 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position (of the distribution before temperature and penalties)."""

    token: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the n most likely, best first."""


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request has got since its last Output. The one with a `finish_reason` is its last."""

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `tokens`, if asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Once, with the first output, if asked for; the first entry is None. A `score` has its own alone."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache (in the first output)."""
    waited: float = 0.0
    """Seconds until its prompt began to be computed (in the first output)."""
    probabilities: tuple[tuple[float, ...], ...] = ()
    """A classification's, one for each label: once for a sequence, or for each of the prompt's tokens."""
    embedding: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The token that ended it, where `finish_reason` is `stop`; it is not in `tokens`."""
    error: str | None = None
    """Why, where `finish_reason` is `error`."""
    error_kind: str | None = None
    """`too_large`, `engine_died`, `out_of_memory`, `adapter`, `composition`, `grammar`, `task` or `internal`."""
