"""Compiling the kernels that are not on disk yet, before anything needs them, by processes of their own: numba
compiles one function at a time in a process.

`python -m onebase_engine.kernels.cpu.build` reads names, one a line, and answers with each once that kernel is on
disk.
"""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from onebase_engine.kernels.cpu import bottleneck as bottleneck
from onebase_engine.kernels.cpu import plain_product as plain_product
from onebase_engine.kernels.cpu import quantize4bit as quantize4bit
from onebase_engine.kernels.cpu import run_layers as run_layers
from onebase_engine.kernels.cpu import screen as screen
from onebase_engine.kernels.cpu.cache import remove_unused, version_folder
from onebase_engine.kernels.cpu.target import PLAIN, TARGET
from onebase_engine.kernels.cpu.task import Compiled

log = logging.getLogger(__name__)

_MOST_PROCESSES = 8
_SECONDS = 2.0
"""Between two lines about how far it is."""
_FIRST = ("region", "quantize4bit")
"""The weights need them, which are loaded meanwhile."""
_SLOW = ("screen._best_of_row", "attention.attend_item", "lowrank.update_tile")
"""Begun before the others: one of two seconds that comes last is waited for alone."""
_LATER = ("bottleneck", "elementwise._affine", "noise", "screen._score", "plain_product")
"""Some adapters and some requests need them."""
_ON_DEMAND = ("matmul4bit.multiply_task_", "grouped", "block_sums.sum_row.all")
"""Compiled at their first use: few bases need them."""


class Build:
    """Starts compiling what is missing. Who uses a kernel before `wait` returns may compile it a second time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` gets a line now and then."""
        remove_unused()
        missing = [kernel.name for kernel in Compiled.known if _is_missing(kernel)] if TARGET != PLAIN else []
        self._missing = sorted(
            missing, key=lambda name: (name.startswith(_LATER), not name.startswith(_FIRST), name not in _SLOW)
        )
        self._made: list[str] = []
        self._tell = tell
        self._thread = threading.Thread(target=self._run, name="kernel-build", daemon=True)
        if missing:
            tell(f"compiling {len(missing)} kernels, once on this machine: kept in {version_folder()}")
            self._thread.start()

    def wait(self) -> None:
        """Until all is compiled that any base needs; the rest goes on. What failed is compiled at its first use."""
        told = time.monotonic()
        while self._thread.is_alive() and any(
            name not in self._made for name in self._missing if not name.startswith(_LATER)
        ):
            self._thread.join(0.02)
            if time.monotonic() - told > _SECONDS:
                told = time.monotonic()
                self._tell(f"compiling kernels, once on this machine: {len(self._made)} of {len(self._missing)}")

    @property
    def over(self) -> bool:
        """Whether nothing is being compiled any more."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        command = [sys.executable, "-m", "onebase_engine.kernels.cpu.build"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("A process has no pipes.")
            process.stdin.write("".join(f"{name}\n" for name in self._missing))
            process.stdin.close()
            for line in process.stdout:
                self._made.append(line.rstrip())
        if len(self._made) < len(self._missing):
            log.warning("%d kernels could not be compiled beforehand", len(self._missing) - len(self._made))


def _is_missing(kernel: Compiled) -> bool:
    return not kernel.name.startswith(_ON_DEMAND) and not kernel.present


def _compile(name: str) -> str:
    next(kernel for kernel in Compiled.known if kernel.name == name).prepare()
    return name


def main() -> None:
    """Compile what the standard input names, by as many processes as there are cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches the whole process group; who reads us decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the engine ignores it, but it is how the pool is ended
    gc.disable()  # a short life
    names = sys.stdin.read().split()
    # All others begin with what numba has learned and loaded by then, a second's worth each.
    print(_compile(names.pop(0)), flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with multiprocessing.get_context("fork").Pool(min(cores, _MOST_PROCESSES, len(names) or 1)) as pool:
        for name in pool.imap_unordered(_compile, names):
            print(name, flush=True)


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # who started this has ended
        main()
