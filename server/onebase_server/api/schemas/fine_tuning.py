"""Bodies of /v1/fine_tuning/jobs: OpenAI's, with every method of ours and its settings."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import Body, Refused

METHODS = (
    "qlora", "lora", "rslora", "dora", "pissa", "adalora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning",
    "p-tuning-v2", "bottleneck", "loha", "lokr", "vera", "oft", "hra",
)  # fmt: skip
"""What `method.type` may be beside `supervised`, which is the first of them."""

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_left_out = BeforeValidator(lambda value: None if value == "auto" else value)
_AutoCount = Annotated[
    _Count | None,
    _left_out,
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["auto", None]}]}),
]
_AutoNumber = Annotated[
    Annotated[float, Field(gt=0, le=1000)] | None,
    _left_out,
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, {"enum": ["auto", None]}]}
    ),
]
_Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Hyperparameters(Body):
    """Settings of `onebase train`, by the names of its command line; left out, they are its defaults."""

    n_epochs: _AutoNumber = None
    batch_size: _AutoCount = None
    """Examples in a step; left out, a step is counted in tokens: `accumulate` times `batch_tokens`, which depend on
    the data if they are left out, too."""
    learning_rate_multiplier: _AutoNumber = None
    """Of `learning_rate`, or of the method's own."""
    learning_rate: float | None = Field(None, gt=0, lt=10)
    head_learning_rate: float | None = Field(None, gt=0, lt=10)
    format: _Text | None = None
    max_length: _Count | None = None
    too_long: Literal["error", "skip", "cut"] | None = None
    eval_fraction: float | None = Field(None, gt=0, lt=1)
    rank: _Count | None = None
    alpha: float | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    targets: _Text | None = None
    rank_pattern: _Text | None = None
    alpha_pattern: _Text | None = None
    modules_to_save: _Text | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    prompt_length: _Count | None = None
    prompt_init: Literal["random", "vocab", "text"] | None = None
    prompt_text: _Text | None = None
    places: _Text | None = None
    encoder: Literal["lstm", "mlp", "none"] | None = None
    encoder_size: _Count | None = None
    placement: Literal["houlsby", "pfeiffer", "parallel"] | None = None
    bottleneck: _Count | None = None
    activation: Literal["relu", "gelu", "silu", "tanh"] | None = None
    scale: float | None = Field(None, gt=0)
    head: bool | None = None
    pooling: Literal["first", "last", "mean"] | None = None
    max_steps: _Count | None = None
    time_limit: float | None = Field(None, gt=0)
    batch_tokens: _Count | None = None
    accumulate: _Count | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0)
    clip: float | None = Field(None, ge=0)
    eval_every: _Count | None = None
    patience: int | None = Field(None, ge=0)
    metric_examples: int | None = Field(None, ge=0, le=10_000)
    max_new_tokens: _Count | None = None

    def options(self) -> dict[str, Any]:
        """As `onebase train` takes them."""
        given = self.model_dump(exclude_none=True)
        return {"epochs" if name == "n_epochs" else name: value for name, value in given.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size is not None and self.accumulate is not None:
            raise InvalidRequestError("accumulate follows from batch_size: send one of them.", field="accumulate")
        return self


class Supervised(Body):
    """What `method` says beside its type."""

    hyperparameters: Hyperparameters | None = None


class FineTuningMethod(Body):
    """How to train: `supervised`, or one of our methods by name."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "dpo": Refused("train from prompts and completions"),
        "reinforcement": Refused("train from prompts and completions"),
    }

    type: str
    supervised: Supervised | None = None
    hyperparameters: Hyperparameters | None = None
    """The same as within `supervised`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.type != "supervised" and self.type not in METHODS:
            raise InvalidRequestError(
                f"method.type {self.type[:80]!r} is not supported: it may be supervised, {', '.join(METHODS)}.",
                field="method.type",
            )
        if self.supervised is not None and self.hyperparameters is not None:
            raise InvalidRequestError(
                "Send the hyperparameters once, in method.supervised or in method.", field="method.hyperparameters"
            )
        return self


class FineTuningRequest(Body):
    """POST /v1/fine_tuning/jobs."""

    refused: ClassVar[Mapping[str, Refused]] = {
        "integrations": Refused("follow the job's events", []),
    }

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(None, min_length=1)
    """The result's name; taken, it gets a new version. Left out, one is made of the job's id."""
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    method: FineTuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    """As in `method`; OpenAI's older place for them."""
    metadata: dict[str, str] | None = None
    """Comes back with the job."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hyperparameters is not None and self.method is not None:
            raise InvalidRequestError(
                "Send the hyperparameters once: within method, if that is given.", field="hyperparameters"
            )
        return self

    def settings(self) -> Hyperparameters:
        """The hyperparameters, wherever they were given."""
        method = self.method
        if method is None:
            given = self.hyperparameters
        elif method.supervised is not None:
            given = method.supervised.hyperparameters
        else:
            given = method.hyperparameters
        return given or Hyperparameters.model_validate({})

    def method_name(self) -> str:
        """As `onebase train` calls it."""
        return METHODS[0] if self.method is None or self.method.type == "supervised" else self.method.type
