"""The result of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase_training.evaluation.evaluation_result import Evaluation
from onebase_training.fitting.early_stopping import Stopped


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    output: Path
    before: Evaluation
    """Evaluation of the base without the adapter."""
    after: Evaluation
    """Evaluation of the result as written: the checkpoint with the best held-out loss."""
    steps: int
    parameters: int
    """Trained ones."""
    tokens_per_second: float
    seconds: float
    """Seconds of training, evaluations left out."""
    peak_memory: int
    """Bytes: of the device, or of the process where that is the host."""
    stopped: Stopped
    """Why it ended."""
    notes: Mapping[str, Any]
    """As in `onebase.json`, but for the metrics."""
    history: Sequence[Mapping[str, float]]
    """One row a logged step or evaluation."""
    lengths: Sequence[int]
    """Tokens of each training example."""
