"""The endpoints' answers, for the OpenAPI document. Answers are made by hand, quickly, and not checked against
these as they go out; the tests and `make fuzz` do that."""

from typing import Any, Literal

from pydantic import BaseModel


def answers(model: type[BaseModel], status: int = 200, *, streams: bool = False) -> dict[str, Any]:
    """Return the arguments of an endpoint's decorator that document its answer."""
    found: dict[str, Any] = {"model": model}
    if streams:
        found["content"] = {"text/event-stream": {}}
    return {"response_model": None, "responses": {status: found}}


class PromptDetails(BaseModel):
    """How the prompt's tokens were read."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class PromptUsage(BaseModel):
    """Tokens of a request that generates nothing."""

    prompt_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """A completion's tokens with their log-probabilities."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    """With `return_token_ids`."""


class CompletionChoice(_Choice):
    """One continuation."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`."""


class _Generated(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class Completion(_Generated):
    """The reply to POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A chosen token, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """An answer's tokens with their log-probabilities."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function that is to be called."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that is to be made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    """One answer."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class Chat(_Generated):
    """The reply to POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`."""
    choices: list[ChatChoice]


class OutputText(BaseModel):
    """Text of a response's message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputItem(BaseModel):
    """A message or a call."""

    type: Literal["message", "function_call"]
    id: str
    status: str
    role: Literal["assistant"] | None = None
    content: list[OutputText] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class Response(BaseModel):
    """The reply to POST /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    model: str
    output: list[OutputItem]
    incomplete_details: dict[str, str] | None
    usage: dict[str, Any] | None
    metadata: dict[str, str]


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """The reply to POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


class Label(BaseModel):
    """A head's verdict."""

    label: str
    probs: list[float]
    num_classes: int


class LabelledToken(Label):
    """A token's label."""

    token: str
    start: int | None
    end: int | None


class Classified(BaseModel):
    """One text's label, or those of its tokens."""

    index: int
    label: str | None = None
    probs: list[float] | None = None
    num_classes: int | None = None
    tokens: list[LabelledToken] | None = None


class Classification(BaseModel):
    """The reply to POST /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Classified]
    usage: PromptUsage


class Model(BaseModel):
    """Something that requests can name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(BaseModel):
    """The reply to GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Adapter(BaseModel):
    """A version of a registered adapter."""

    id: str
    object: Literal["adapter"]
    version: int
    current: bool
    versions: list[int]
    digest: str
    base: str
    source: str
    created: int
    status: Literal["served", "not_served"]
    problem: str | None
    info: dict[str, Any]
    metrics: dict[str, Any] | None


class Adapters(BaseModel):
    """The reply to GET /v1/adapters."""

    object: Literal["list"]
    data: list[Adapter]


class Deleted(BaseModel):
    """The reply to a DELETE."""

    id: str
    object: str
    deleted: Literal[True]


class Tokens(BaseModel):
    """The reply to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(BaseModel):
    """The reply to POST /detokenize."""

    prompt: str


class File(BaseModel):
    """An uploaded file, or a job's result."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    expires_at: int | None


class _Page(BaseModel):
    object: Literal["list"]
    has_more: bool


class Files(_Page):
    """The reply to GET /v1/files."""

    data: list[File]
    first_id: str | None
    last_id: str | None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class Job(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    user_provided_suffix: str | None
    seed: int
    integrations: list[Any]
    metadata: dict[str, str]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]


class Jobs(_Page):
    """The reply to GET /v1/fine_tuning/jobs."""

    data: list[Job]


class JobEvent(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobEvents(_Page):
    """The reply to GET /v1/fine_tuning/jobs/{id}/events."""

    data: list[JobEvent]


class Checkpoint(BaseModel):
    """One of a job's evaluations."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str | None
    step_number: int
    metrics: dict[str, float | None]


class Checkpoints(_Page):
    """The reply to GET /v1/fine_tuning/jobs/{id}/checkpoints."""

    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None


class Health(BaseModel):
    """The reply to GET /health."""

    status: Literal["ok"]
    model: str
    adapters: int
    engine: dict[str, int]


class Version(BaseModel):
    """The reply to GET /version."""

    version: str
