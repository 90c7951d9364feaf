"""OneBase: one frozen 4-bit base, any number of adapters, served in one batch and trained.

From Python: `from onebase import LLM, SamplingParams, TrainConfig, train`. Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onebase_contract.settings import TrainConfig
    from onebase_engine.llm import LLM
    from onebase_engine.llm_values import SamplingParams
    from onebase_training.training_run import train

__all__ = ["LLM", "SamplingParams", "TrainConfig", "train"]

_WHERE = {
    "LLM": "onebase_engine.llm",
    "SamplingParams": "onebase_engine.llm_values",
    "TrainConfig": "onebase_contract.settings",
    "train": "onebase_training.training_run",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
