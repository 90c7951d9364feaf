"""`onebase train`: the command line, resolved to one TrainConfig. What is heavy is imported once it is needed."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli.options import takes_settings
from onebase_contract.settings import TrainConfig


@takes_settings()
def train(
    config: TrainConfig,
    *,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            show_envvar=False,
            rich_help_panel="Configuration and output",
            help="Write curves for tensorboard into this folder.",
        ),
    ] = None,
    json_events: Annotated[
        bool,
        typer.Option(
            "--json",
            show_envvar=False,
            rich_help_panel="Configuration and output",
            help="Tell of progress in lines of JSON on standard output.",
        ),
    ] = False,
) -> None:
    """Train an adapter from a data file."""
    from onebase.cli.terminal.run_view import show, watched
    from onebase_contract.events import json_lines
    from onebase_contract.run_folder import Workspace
    from onebase_training.fitting.checkpoints import last_checkpoint, step_of
    from onebase_training.fitting.distributed import this_process
    from onebase_training.report.tensorboard import also_tensorboard
    from onebase_training.training_run import train as run

    if not this_process().first:
        run(config)
        return
    shown = json_lines(sys.stdout) if json_events else watched()
    try:
        with shown as progress, also_tensorboard(progress, tensorboard) as both:
            result = run(config, both)
    except KeyboardInterrupt:
        saved = last_checkpoint(Workspace.of(config).folder)
        typer.echo(_stopped(saved, step_of(saved) if saved else 0, sys.argv), err=True)
        raise
    if not json_events:
        show(result)


def _stopped(saved: Path | None, step: int, command: Sequence[str]) -> str:
    """Say what is left of an interrupted run, and give the command that goes on with it."""
    if saved is None:
        return "Stopped before the first checkpoint: nothing is kept."
    again = [Path(command[0]).name, *(word for word in command[1:] if word not in ("--overwrite", "--resume"))]
    return f"Stopped. Step {step} is saved, in {saved}. This goes on from it:\n  {shlex.join([*again, '--resume'])}"
