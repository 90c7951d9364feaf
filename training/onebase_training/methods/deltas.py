"""Methods that PEFT puts wholly into the base's linear modules, and that differ only by their configuration."""

from collections.abc import Callable
from typing import Any

import peft

from onebase_contract.settings import TrainConfig
from onebase_engine.base.load_base import LoadedBase
from onebase_training.methods.peft_parts import attach_peft, target_names, task_type
from onebase_training.model.attached import Attached

Attach = Callable[[LoadedBase, TrainConfig, int], Attached]


def delta(
    settings: Callable[..., peft.PeftConfig], rank: int | None = None, rank_field: str = "r", **options: Any
) -> Attach:
    """A method by its PEFT configuration; `rank` is its default, `rank_field` what PEFT calls it."""

    def attach(base: LoadedBase, config: TrainConfig, steps: int) -> Attached:
        ranks = {} if rank is None else {rank_field: config.rank or rank}
        scales = {} if config.alpha is None or "alpha" not in options else {"alpha": config.alpha}
        made = settings(
            target_modules=target_names(base, config),
            modules_to_save=list(config.modules_to_save) or None,
            task_type=task_type(base),
            **(options | ranks | scales),
        )
        return attach_peft(base, made)

    return attach
