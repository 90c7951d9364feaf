"""The settings of a training run: one plain value, documented per field, that a file or a command line can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from onebase_adapters.errors import ConfigError
from onebase_engine.base.base_spec import DEFAULT_BASE

Schedule = Literal["cosine", "linear", "constant"]
Choice = Literal["auto", "always", "never"]
Arithmetic = Literal["bf16", "float32"]


JOB_METHODS = (
    "qlora", "lora", "rslora", "dora", "pissa", "adalora", "ia3", "prompt-tuning", "p-tuning", "prefix-tuning",
    "p-tuning-v2", "bottleneck", "loha", "lokr", "vera", "oft", "hra",
)  # fmt: skip
"""The methods that fine-tuning jobs offer, whose result is an adapter. The first is the default."""


@dataclass(frozen=True)
class Bounds:
    """The range that a number must keep to, by the names that JSON schemas and pydantic have."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def hold(self, value: float) -> bool:
        """Whether `value` is within them; nan is not."""
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __str__(self) -> str:
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return " and ".join(
            f"{word} {value:g}" for name, word in words.items() if (value := getattr(self, name)) is not None
        )


_COUNT = Bounds(ge=1, le=2**31 - 1)
_SHARE = Bounds(ge=0, lt=1)
BOUNDS: Mapping[str, Bounds] = {
    "eval_fraction": Bounds(gt=0, lt=1),
    "max_length": Bounds(ge=2, le=2**31 - 1),
    "rank": _COUNT,
    "alpha": Bounds(gt=0),
    "dropout": _SHARE,
    "prompt_length": _COUNT,
    "encoder_size": _COUNT,
    "bottleneck": _COUNT,
    "scale": Bounds(gt=0),
    "epochs": Bounds(gt=0),
    "max_steps": _COUNT,
    "time_limit": Bounds(gt=0),
    "batch_tokens": _COUNT,
    "accumulate": _COUNT,
    "batch_size": _COUNT,
    "learning_rate": Bounds(gt=0, lt=10),
    "head_learning_rate": Bounds(gt=0, lt=10),
    "learning_rate_multiplier": Bounds(gt=0, le=1000),
    "warmup": _SHARE,
    "weight_decay": Bounds(ge=0),
    "clip": Bounds(ge=0),
    "eval_every": _COUNT,
    "patience": Bounds(ge=0),
    "metric_examples": Bounds(ge=0),
    "max_new_tokens": _COUNT,
}
"""The ranges that numeric settings must keep to, wherever they are set."""

JOB_SETTINGS = (
    *("learning_rate", "head_learning_rate", "format", "max_length", "too_long", "skip_bad", "eval_fraction"),
    *("rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"),
    *("prompt_length", "prompt_init", "prompt_text", "places", "encoder", "encoder_size"),
    *("placement", "bottleneck", "activation", "scale", "head", "pooling"),
    *("max_steps", "time_limit", "batch_tokens", "accumulate", "schedule", "warmup", "weight_decay", "clip"),
    *("eval_every", "patience", "metric_examples", "max_new_tokens"),
)
"""Settings of a job beyond those that OpenAI has as well (epochs, batch size, learning rate multiplier, seed)."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result, and where it goes. Its fields are the options of `onebase train`, see
    `onebase.cli.options`."""

    data: Path | tuple[Path, ...]
    """Training examples; of several tasks if given several times. `onebase data check` knows the formats."""
    output: Path
    """Folder of the result. Must not exist, unless `overwrite` or `resume` says what to do with it."""
    method: str = "qlora"
    """See `onebase methods`."""
    model: str = DEFAULT_BASE
    """The base: catalog name, folder, .gguf file, or hub id."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: cuda where there is one."""
    eval_data: Path | None = None
    """Held-out examples. Default: `eval_fraction` of `data` is held out."""
    eval_fraction: float = 0.1
    """Share of `data` that is held out, in (0, 1)."""
    format: str | None = None
    """The data's format; default: recognised from its columns."""
    max_length: int = 1024
    """Most tokens of one example; never more than the base's context."""
    skip_bad: bool = False
    """Leave out records that cannot be used, and say how many there were, instead of refusing the file."""
    too_long: Literal["error", "skip", "cut"] = "error"
    """How to treat an example of more than max_length tokens: refuse the data, leave it out, or cut its end off."""

    rank: int | None = None
    """Rank of low-rank updates. Default: the method's."""
    alpha: float | None = None
    """Low-rank updates are scaled by alpha / rank. Default: twice the rank."""
    dropout: float = 0.0
    """Share of the inputs of low-rank updates that is dropped while training, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the modules that get an update, e.g. `q_proj`. Default: all linear layers but the
    head (QLoRA, section 4: needed to match full fine-tuning), or what the method names."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some modules: ends of their names, as regular expressions, to ranks, e.g. q_proj=32."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other alphas for some modules, written as in rank_pattern."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the update, e.g. `lm_head`, `embed_tokens`."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which of the base's biases are trained, too."""

    prompt_length: int = 20
    """Virtual tokens of prompt tuning and P-tuning, or of the prefix."""
    prompt_init: Literal["random", "vocab", "text"] = "vocab"
    """Prompt tuning begins with noise, with random tokens' embeddings, or with those of `prompt_text` (Lester et
    al. 2021, section 3.2: the latter two are better). A prefix begins with the keys and values of the same."""
    prompt_text: str = ""
    """For `prompt_init="text"`; repeated or cut to `prompt_length` tokens."""
    places: tuple[int, ...] = ()
    """Where P-tuning's tokens stand, one number each: k before the prompt's k-th token, -1 after its last one.
    Default: all `prompt_length` in front."""
    encoder: Literal["lstm", "mlp", "none"] | None = None
    """Network that makes virtual tokens or a prefix of learned vectors while training; folded away when written."""
    encoder_size: int | None = None
    """Hidden width of the encoder. Default: the base's."""

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where bottleneck adapters stand: behind attention and MLP, behind the MLP, or beside it."""
    bottleneck: int = 48
    """Width of bottleneck adapters."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """The function between a bottleneck's two layers."""
    scale: float = 1.0
    """Factor on a bottleneck's output."""

    init_from: Path | None = None
    """Folder of an adapter of the same method and sizes to begin with, for example a prompt that was trained on
    several tasks (P-tuning v2, section 3.2)."""

    head: bool = False
    """Train a classifier on labels or tags in place of the language model's head. On encoders always."""
    pooling: Literal["first", "last", "mean"] | None = None
    """Token of an encoder by which a text is classified. Default: the mean of all. Of a decoder it is the last."""
    candidates: Path | None = None
    """Wordings for `hard-prompt`, JSON lines of {"before", "after"} or {"messages"}, with {"stop": [texts]} if the
    usual line break is not to end an answer. Default: some usual ones."""

    label_words: Mapping[str, str] = field(default_factory=dict)
    """Words that stand for labels or tags, e.g. 0=negative,1=positive: the model learns faster from words that it
    knows than from numbers or codes. Served answers are these words, too."""

    epochs: float = 3.0
    """Passes over the training part."""
    max_steps: int | None = None
    """Optimiser steps after which the run ends; the schedule is made for them."""
    time_limit: float | None = None
    """Seconds of training after which the run ends, wherever its schedule is."""
    batch_tokens: int | None = None
    """Tokens of one forward pass. Examples are packed whole, without padding, and do not see each other;
    an encoder-decoder's are padded, which counts. Default: 8 examples of the mean length, within 256
    and 1024 tokens."""
    accumulate: int = 1
    """Forward passes in one optimiser step."""
    batch_size: int | None = None
    """Examples in one optimiser step, counted instead of tokens: in as many passes as keep each, on average, within
    `batch_tokens`. Default: what fits into `accumulate` passes of `batch_tokens`."""
    learning_rate: float | None = None
    """Highest learning rate of the run. Default: the method's."""
    head_learning_rate: float | None = None
    """Highest learning rate of a classifier. Default: 3e-3."""
    learning_rate_multiplier: float = 1.0
    """Factor on both learning rates."""
    schedule: Schedule = "cosine"
    """How the learning rate goes on from its highest: towards zero, or not at all with `constant`."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises linearly from zero, in [0, 1)."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    seed: int = 0
    """Seed of initialisation, order, split and dropout."""

    eval_every: int | None = None
    """Steps between evaluations, at each of which a checkpoint is written. Default: eight in a run."""
    patience: int = 3
    """So many evaluations after the best one the run stops. 0: never. The best has the lowest held-out loss; of a
    classification, it is the last whose accuracy is within a standard error of the highest."""
    metric_examples: int = 64
    """Held-out examples that are generated for the task's metric, before and after. 0: none."""
    max_new_tokens: int = 128
    """Most tokens generated for one of the metric_examples."""

    arithmetic: Arithmetic | None = None
    """Number format of matrix products; trained parameters are float32 in both. Default: bfloat16 where the
    processor multiplies it, float32 where it would emulate it, which a measured product decides."""
    dequantize: Choice = "auto"
    """Hold the frozen weights as plain matrices of the arithmetic, instead of making those anew for every product.
    The same numbers, faster; `auto` does so for bfloat16 where a quarter of the free memory is enough."""
    checkpointing: Choice = "auto"
    """Recompute activations in the backward pass (Chen et al. 2016). `auto`: where memory needs it."""
    deepspeed: Literal["none", "zero2", "zero3"] = "none"
    """Spread optimiser and gradients (zero2), and weights too (zero3), over the processes that torchrun starts
    (ZeRO, Rajbhandari et al. 2020)."""
    fsdp: bool = False
    """Spread weights, optimiser and gradients over the processes that torchrun starts by torch itself (FSDP2). The
    same in what it saves as zero3, without another library."""
    offload: bool = False
    """With DeepSpeed or fsdp: keep on the host what does not fit on the device."""
    overwrite: bool = False
    """Replace an existing output, and drop an unfinished run's checkpoints."""
    resume: bool = False
    """Continue an unfinished run from its last checkpoint."""

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not bounds.hold(value):
                raise ConfigError(f"{name} is {value!r}, and must be {bounds}.", field=name)
        if any(place < -1 for place in self.places):
            raise ConfigError(f"places cannot be {self.places!r}: each is -1 or more.", field="places")
        if self.batch_size is not None and self.accumulate != 1:
            raise ConfigError(
                f"With a batch_size (now {self.batch_size}) accumulate follows from it: leave it out.",
                field="accumulate",
            )
        if self.prompt_init == "text" and not self.prompt_text:
            raise ConfigError("prompt_init = text needs a prompt_text.", field="prompt_text")
        if self.fsdp and self.deepspeed != "none":
            raise ConfigError("fsdp and deepspeed both spread the model: choose one.", field="fsdp")
        if self.overwrite and self.resume:
            raise ConfigError("overwrite starts again, resume goes on: choose one.", field="resume")

    def settings(self) -> dict[str, Any]:
        """As JSON, without what does not decide the result."""
        left_out = ("output", "overwrite", "resume", "device")
        values = asdict(self) | {"data": self.files}
        return {key: _json(value) for key, value in values.items() if key not in left_out}

    @property
    def spread(self) -> bool:
        """Whether a library spreads the run's state over processes."""
        return self.fsdp or self.deepspeed != "none"

    @property
    def spread_weights(self) -> bool:
        """Whether it spreads the base's weights, too."""
        return self.fsdp or self.deepspeed == "zero3"

    @property
    def files(self) -> tuple[Path, ...]:
        """`data` as several files."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def resolved(self, **values: Any) -> "TrainConfig":
        """With `values` in the place of fields that are None."""
        return replace(self, **{key: value for key, value in values.items() if getattr(self, key) is None})


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value
