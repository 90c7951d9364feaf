"""`onebase serve` as a person starts it: a process of its own, its terminal output, its signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ONEBASE = Path(sys.executable).with_name("onebase")


class ServeProcess:
    """A running `onebase serve` with what it has printed so far."""

    def __init__(self, *arguments: str | Path, home: Path) -> None:
        """`home` takes whatever it keeps."""
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            [ONEBASE, "serve", *map(str, arguments)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"ONEBASE_HOME": str(home), "COLUMNS": "200"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        with self.popen.stderr as lines:
            self.lines += (line.rstrip("\n") for line in lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, happened: Callable[[], object], seconds: float = 90) -> None:
        """Until it has happened; fails with what was printed if the server has ended or time is up."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.popen.poll() is None, f"ended with {self.popen.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{self.text}"
            time.sleep(0.02)

    def wait_until_ready(self) -> str:
        """Its URL, without the path."""
        self.wait_for(lambda: any(line.split()[:1] == ["url"] for line in self.lines[:]))
        (line,) = [line for line in self.lines if line.split()[:1] == ["url"]]
        return line.split()[1].removesuffix("/v1")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        """To the whole group, as a terminal's Ctrl-C goes."""
        os.killpg(self.popen.pid, number)

    def end(self, seconds: float = 60) -> int:
        """Wait for its end; its exit status."""
        status = self.popen.wait(seconds)
        self._reader.join()
        return status

    def kill(self) -> None:
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.end()


def gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
    """Whether all of them end in that time (as zombies they have)."""
    alive = psutil.wait_procs([p for p in processes if p.is_running()], seconds)[1]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
