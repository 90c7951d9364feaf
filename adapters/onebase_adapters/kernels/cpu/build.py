"""Compiling the kernels that are not on disk yet, before anything needs them, in processes of their own: numba
compiles one function at a time in a process.

`python -m onebase_adapters.kernels.cpu.build` is such a process: it reads names, one a line, and answers with the
same line once that kernel is on disk.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

from onebase_adapters.kernels.cpu import bottleneck as bottleneck
from onebase_adapters.kernels.cpu import decoder as decoder
from onebase_adapters.kernels.cpu import quantize4bit as quantize4bit
from onebase_adapters.kernels.cpu import screen as screen
from onebase_adapters.kernels.cpu.cache import remove_unused, version_folder
from onebase_adapters.kernels.cpu.target import PLAIN, TARGET
from onebase_adapters.kernels.cpu.task import Compiled

log = logging.getLogger(__name__)

_MOST_PROCESSES = 8
_SECONDS = 2.0
"""Between two lines about how far it is."""


class Build:
    """Starts compiling what is missing. Who uses a kernel before `wait` returns may compile it a second time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` gets a line now and then."""
        remove_unused()
        missing = [kernel.name for kernel in Compiled.known if not kernel.present] if TARGET != PLAIN else []
        # The weights need them, which are loaded meanwhile.
        self._missing = sorted(missing, key=lambda name: not name.startswith(("region", "quantize4bit")))
        self._all = len(missing)
        self._made: list[str] = []
        self._tell = tell
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = [
            threading.Thread(target=self._run, name="kernel-build", daemon=True)
            for _ in range(min(cores, _MOST_PROCESSES, self._all))
        ]
        if missing:
            tell(f"compiling {self._all} kernels, once on this machine: kept in {version_folder()}")
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all is compiled. What could not be is compiled when it is first used."""
        for thread in self._threads:
            thread.join(_SECONDS)
            while thread.is_alive():
                self._tell(f"compiling kernels, once on this machine: {len(self._made)} of {self._all}")
                thread.join(_SECONDS)
        if len(self._made) < self._all:
            log.warning("%d kernels could not be compiled beforehand", self._all - len(self._made))
        self._threads, self._all = [], len(self._made)

    def _run(self) -> None:
        """Give a process of its own one kernel after another, as long as there are any."""
        command = [sys.executable, "-m", "onebase_adapters.kernels.cpu.build"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            while self._missing and process.stdin is not None and process.stdout is not None:
                try:
                    name = self._missing.pop(0)
                    print(name, file=process.stdin, flush=True)
                except (IndexError, BrokenPipeError):
                    break
                if process.stdout.readline() != f"{name}\n":
                    break
                self._made.append(name)


def main() -> None:
    """Compile what the standard input names, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # reaches the whole process group; who reads us decides
    kernels = {kernel.name: kernel for kernel in Compiled.known}
    for line in sys.stdin:
        kernels[line.rstrip()].prepare()
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()
