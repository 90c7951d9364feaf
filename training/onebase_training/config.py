"""What a training run is: one plain value, documented per field, that a file or a command line can write down."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onebase_adapters.base import DEFAULT_BASE
from onebase_adapters.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant"]
Choice = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result, and where it goes. Fields of None take the method's default."""

    data: Path
    """Training examples; see `onebase data check` for the formats."""
    output: Path
    """Folder of the result. Must not exist, unless `overwrite` or `resume` says what to do with it."""
    method: str = "qlora"
    """A name in `onebase_training.methods.METHODS`."""
    model: str = DEFAULT_BASE
    """The base: catalog name, folder, or hub id."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: cuda where there is one."""
    eval_data: Path | None = None
    """Held-out examples. None: `eval_fraction` of `data` is held out."""
    eval_fraction: float = 0.1
    """Share of `data` that is held out, in (0, 1)."""
    format: str | None = None
    """The data's format; None: recognised from its columns."""
    max_length: int = 1024
    """Most tokens of one example; never more than the base's context."""
    too_long: Literal["error", "skip", "cut"] = "error"
    """What happens to an example of more tokens."""

    rank: int = 16
    """Of low-rank updates (LoRA, section 4.1)."""
    alpha: float | None = None
    """LoRA's scale is alpha / rank. None: twice the rank."""
    dropout: float = 0.0
    """On the input of low-rank updates, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the modules that get an update, e.g. `q_proj`. Empty: all linear layers but the head
    (QLoRA, section 4: needed to match full fine-tuning)."""

    epochs: float = 3.0
    """Passes over the training part."""
    max_steps: int | None = None
    """Optimiser steps after which the run ends; the schedule is made for them."""
    time_limit: float | None = None
    """Seconds of training after which the run ends, wherever its schedule is."""
    batch_tokens: int = 1024
    """Tokens of one forward pass. Examples are packed whole, without padding, and do not see each other."""
    accumulate: int = 1
    """Forward passes in one optimiser step."""
    learning_rate: float | None = None
    """Peak. None: the method's default, whose source stands in its file."""
    schedule: Schedule = "cosine"
    """From the peak towards zero; `constant` stays."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly from zero, in [0, 1)."""
    weight_decay: float = 0.0
    """AdamW's, on matrices."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    seed: int = 0
    """Of initialisation, order, split and dropout."""

    eval_every: int | None = None
    """Steps between evaluations, at each of which a checkpoint is written. None: eight in a run."""
    patience: int = 3
    """Evaluations in a row without a better held-out loss after which the run stops. 0: never."""
    metric_examples: int = 64
    """Held-out examples that are generated for the task's metric, before and after. 0: none."""
    max_new_tokens: int = 128
    """Most tokens generated for one of them."""

    dequantize: Choice = "auto"
    """Hold the frozen 4-bit weights as the bfloat16 values that they stand for, instead of making those anew in
    every step. The same numbers, faster; `auto` does so where a quarter of the free memory is enough."""
    checkpointing: Choice = "auto"
    """Recompute activations in the backward pass (Chen et al. 2016). `auto`: where memory needs it."""
    overwrite: bool = False
    """Replace an existing output, and drop an unfinished run's checkpoints."""
    resume: bool = False
    """Continue an unfinished run from its last checkpoint."""

    def __post_init__(self) -> None:
        rules = {
            "eval_fraction": 0 < self.eval_fraction < 1,
            "max_length": self.max_length >= 2,
            "rank": self.rank >= 1,
            "alpha": self.alpha is None or self.alpha > 0,
            "dropout": 0 <= self.dropout < 1,
            "epochs": self.epochs > 0,
            "max_steps": self.max_steps is None or self.max_steps >= 1,
            "time_limit": self.time_limit is None or self.time_limit > 0,
            "batch_tokens": self.batch_tokens >= 1,
            "accumulate": self.accumulate >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < 10,
            "warmup": 0 <= self.warmup < 1,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip >= 0,
            "eval_every": self.eval_every is None or self.eval_every >= 1,
            "patience": self.patience >= 0,
            "metric_examples": self.metric_examples >= 0,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for field, holds in rules.items():
            if not holds:
                raise ConfigError(f"{field} cannot be {getattr(self, field)!r}.", field=field)
        if self.overwrite and self.resume:
            raise ConfigError("overwrite starts again, resume goes on: choose one.", field="resume")

    def settings(self) -> dict[str, Any]:
        """As JSON, without what does not decide the result."""
        left_out = ("output", "overwrite", "resume", "device")
        values = {key: value for key, value in asdict(self).items() if key not in left_out}
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }

    def resolved(self, **values: Any) -> "TrainConfig":
        """With `values` in the place of fields that are None."""
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})
