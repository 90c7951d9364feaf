"""Bodies of /v1/fine_tuning/jobs: OpenAI's, with every method of ours and its settings."""

from collections.abc import Mapping
from dataclasses import asdict
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, WithJsonSchema, create_model, model_validator

from onebase_contract.settings import BOUNDS, JOB_METHODS, JOB_SETTINGS, Bounds, TrainConfig
from onebase_server.api.error_replies import InvalidRequestError
from onebase_server.api.schemas.body import Body, Refused

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


def _field(name: str) -> tuple[Any, Any]:
    """The setting's type and bounds; what is no number, truth value or choice is written as on the command line."""
    hint = _HINTS[name]
    kinds = [hint] if get_origin(hint) is Literal else get_args(hint) or [hint]
    typed = all(kind in (int, float, bool, NoneType) or get_origin(kind) is Literal for kind in kinds)
    listed = get_origin(hint) in (tuple, Mapping)
    bounds = {key: value for key, value in asdict(BOUNDS.get(name, Bounds())).items() if value is not None}
    return (hint if typed and not listed else _Text) | None, Field(None, **bounds)


_HINTS = get_type_hints(TrainConfig)

if TYPE_CHECKING:
    _TrainerSettings = Body
else:
    _TrainerSettings = create_model(
        "_TrainerSettings", __base__=Body, **{name: _field(name) for name in JOB_SETTINGS}
    )


class Hyperparameters(_TrainerSettings):
    """Settings of `onebase train`, by the names of its command line; left out, they are its defaults."""

    n_epochs: _AutoNumber = None
    batch_size: _AutoCount = None
    """Examples in a step; left out, a step is counted in tokens: `accumulate` times `batch_tokens`, which depend on
    the data if they are left out, too."""
    learning_rate_multiplier: _AutoNumber = None
    """Factor on `learning_rate`, or on the method's own."""

    def options(self) -> dict[str, Any]:
        """As `onebase train` takes them."""
        given = self.model_dump(exclude_none=True)
        return {"epochs" if name == "n_epochs" else name: value for name, value in given.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size is not None and "accumulate" in self.options():
            raise InvalidRequestError("accumulate follows from batch_size: send one of them.", field="accumulate")
        return self


class Supervised(Body):
    """The settings in `method`, beside its type."""

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
        if self.type != "supervised" and self.type not in JOB_METHODS:
            raise InvalidRequestError(
                f"method.type {self.type[:80]!r} is not supported: it may be supervised, {', '.join(JOB_METHODS)}.",
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
        return JOB_METHODS[0] if self.method is None or self.method.type == "supervised" else self.method.type
