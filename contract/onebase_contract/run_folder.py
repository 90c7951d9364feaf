"""Where a run keeps what it needs to go on: a hidden folder beside the output, gone when the output is there."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebase_adapters.atomic_files import disk_errors, staged_directory
from onebase_adapters.errors import ConfigError
from onebase_contract.settings import TrainConfig

_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Workspace:
    """The work folder of one output. A folder that exists holds a whole `run.json`."""

    output: Path
    _handles: list[int] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, config: TrainConfig) -> "Workspace":
        return cls(config.output.expanduser().resolve())

    @property
    def folder(self) -> Path:
        return self.output.parent / f".{self.output.name}.training"

    def begin(self, config: TrainConfig, **notes: Any) -> None:
        """Start afresh with these notes, or check that what is there is the same run. Raises ConfigError."""
        run = {"settings": config.settings(), **notes}
        if config.resume:
            _check_same(self.notes(), run)
        else:
            with staged_directory(self.folder) as scratch:
                (scratch / _RUN_FILE).write_text(json.dumps(run))
        self._hold()

    def _hold(self) -> None:
        """Lock the folder for as long as this process lives. Raises ConfigError if another one has it."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ConfigError(
                f"Another process is training {self.output} now. Choose another output, or wait for it.",
                field="output",
            ) from error
        self._handles.append(handle)

    def notes(self) -> dict[str, Any]:
        """Read the settings and notes that `begin` wrote."""
        notes: dict[str, Any] = json.loads((self.folder / _RUN_FILE).read_text())
        return notes

    def let_go(self) -> None:
        """Let another run, of this process too, have the folder."""
        while self._handles:
            os.close(self._handles.pop())

    def clear(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder, ignore_errors=True)


def open_workspace(config: TrainConfig) -> Workspace:
    """Check that the output may be written, before any time is spent. Raises ConfigError or StorageError."""
    workspace = Workspace.of(config)
    output, folder = workspace.output, workspace.folder
    if output.exists() and not config.overwrite:
        if config.resume:
            raise ConfigError(f"{output} is finished: there is nothing to resume.", field="resume")
        raise ConfigError(f"{output} exists. Choose another output, or --overwrite it.", field="output")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file, not a folder.", field="output")
    if config.resume and not folder.exists():
        raise ConfigError(f"There is no unfinished run for {output}; start it without --resume.", field="resume")
    if folder.exists():
        workspace._hold()
        workspace.let_go()
    if not config.resume and not config.overwrite and any(folder.glob("checkpoint-*")):
        raise ConfigError(
            f"An unfinished run for {output} is there. Go on with --resume, or start again with --overwrite.",
            field="output",
        )
    with disk_errors(str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f".{output.name}.*.partial"):  # of runs that were killed
            shutil.rmtree(leftover, ignore_errors=True)
    return workspace


def _check_same(stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    free = {"time_limit"}  # how long to go on may change
    settings = dict(run["settings"])
    for name, value in stored["settings"].items():
        if name not in free and settings.get(name) != value:
            raise ConfigError(
                f"The unfinished run has {name} = {value!r}, this one {settings.get(name)!r}. "
                "Resume with the same settings, or start again with --overwrite.",
                field=name,
            )
    for name, value in stored.items():
        if name in run and name != "settings" and run[name] != value:
            raise ConfigError(
                f"The {name} is another one than the unfinished run's ({value} before, {run[name]} now). "
                "Start again with --overwrite.",
                field=name,
            )
