"""The server's answers, typed. Fields that a newer server adds are ignored."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class AdapterInfo(_Answer):
    """The properties of an adapter that the server found when it lowered it."""

    method: str
    parameters: int
    rank: int | None = None
    """The largest, where the method has one."""
    bytes: int = 0
    """Memory while resident."""
    primitives: tuple[str, ...] = ()
    """For example `LowRank x 210`."""
    sites: int = 0
    virtual_tokens: int = 0
    """Taken from the context by each of its requests."""


class Adapter(_Answer):
    """A registered adapter."""

    id: str
    """Its name: what requests give as `model`."""
    version: int
    current: bool = True
    """Whether the name alone means this version."""
    versions: list[int] = []
    """All that there are; requests can give `name@version`."""
    digest: str
    """The digest of its files' contents."""
    base: str
    """Fingerprint of the base that it is for."""
    source: str
    """A path on the server, or `upload`."""
    created: int
    """Seconds since the epoch."""
    status: Literal["served", "not_served"]
    problem: str | None = None
    """Why it is not served."""
    info: AdapterInfo
    metrics: dict[str, Any] | None = None
    """The training run's, where OneBase's trainer made the adapter."""


class Model(_Answer):
    """Something that requests can name."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    """The base, for an adapter."""
    max_model_len: int


class Usage(_Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int


class CompletionLogprobs(_Answer):
    """A completion's tokens; the entries of the four lists belong together."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One continuation, or in a stream its next piece."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    """`stop` or `length`; None while a stream goes on."""
    stop_reason: str | int | None = None
    """The stop string or token that ended it."""


class Completion(_Answer):
    """Answer of `complete`, or one event of `complete_stream`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The first choice's text; empty in a stream's last event, which has only the usage."""
        return self.choices[0].text if self.choices else ""


class TokenLogprob(_Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ChosenLogprob(TokenLogprob):
    """A chosen token, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob] = []


class ChatLogprobs(_Answer):
    """An answer's tokens with their log-probabilities."""

    content: list[ChosenLogprob] | None = None


class FunctionCall(_Answer):
    """A function that the model wants called."""

    name: str
    arguments: str
    """JSON."""


class ToolCall(_Answer):
    """One call of a tool."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatMessage(_Answer):
    """The model's turn."""

    role: str
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    stop_reason: str | int | None = None


class Chat(_Answer):
    """Answer of `chat`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].message.content or ""


class FunctionCallDelta(_Answer):
    """A part that a stream adds to a function's call."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(_Answer):
    """A part that a stream adds to one of the tool calls."""

    index: int
    id: str | None = None
    function: FunctionCallDelta | None = None


class ChatDelta(_Answer):
    """A part that a stream adds to a message."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(_Answer):
    """One answer's next piece."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatChunk(_Answer):
    """One event of `chat_stream`."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """The text that it adds to the first choice."""
        return (self.choices[0].delta.content or "") if self.choices else ""


class Embedding(_Answer):
    """One text's vector, of length 1."""

    index: int
    embedding: list[float]


class TokenLabel(_Answer):
    """One token's label, from a head that labels tokens."""

    token: str
    start: int | None = None
    """Where it is in the text, in characters; a token of an adapter's template begins and ends at one place."""
    end: int | None = None
    label: str
    probs: list[float]


class Classification(_Answer):
    """One text's label, or the labels of its tokens."""

    index: int
    label: str | None = None
    probs: list[float] | None = None
    """In the order of the adapter's labels."""
    tokens: list[TokenLabel] | None = None


class AdapterPart(TypedDict):
    """One of the adapters that a request composes: their changes of the base are weighted and added up."""

    name: str
    weight: NotRequired[float]
    """1 if left out. Templates, learned tokens and prefixes, and heads have no other."""


class GenerationOptions(TypedDict, total=False):
    """How to generate: OpenAI's fields, then vLLM's. What is left out is the server's default."""

    adapters: Sequence[AdapterPart]
    """Several for one request; `model` is the base then, or None."""
    max_tokens: int
    n: int
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: str | Sequence[str]
    user: str
    top_k: int
    min_p: float
    repetition_penalty: float
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    priority: int


class CompletionOptions(GenerationOptions, total=False):
    """The options of completions beside the prompt."""

    echo: bool
    logprobs: int
    best_of: int
    add_special_tokens: bool


class ChatOptions(GenerationOptions, total=False):
    """The options of chats beside the messages."""

    logprobs: bool
    top_logprobs: int
    chat_template_kwargs: Mapping[str, Any]


Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`"""
