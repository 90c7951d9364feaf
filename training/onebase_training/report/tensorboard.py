"""Curves for tensorboard, where asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onebase_adapters.errors import ConfigError
from onebase_contract.events import Evaluated, Event, Progress, Step


@contextmanager
def also_tensorboard(progress: Progress, folder: Path | None) -> Iterator[Progress]:
    """`progress`, which also writes to `folder` if there is one. Raises ConfigError without tensorboard."""
    if folder is None:
        yield progress
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed: pip install tensorboard.", field="tensorboard") from error
    writer = SummaryWriter(str(folder))

    def both(event: Event) -> None:
        progress(event)
        if isinstance(event, Step):
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/tokens_per_second", event.tokens_per_second, event.step)
        elif isinstance(event, Evaluated):
            writer.add_scalar("held_out/loss", event.loss, event.step)
            if event.accuracy is not None:
                writer.add_scalar("held_out/accuracy", event.accuracy, event.step)

    try:
        yield both
    finally:
        writer.close()
