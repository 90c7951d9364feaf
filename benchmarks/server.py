"""A server for a benchmark: `onebase serve` in a process of its own, as a user starts it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.adapters import register

_KEY = "benchmark"


@dataclass(frozen=True)
class Memory:
    """What the server's processes take, in bytes."""

    resident: int
    """Everything, libraries' code included; pages that processes share count once."""
    anonymous: int
    """Without what the system can drop and read again from files."""


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    process: psutil.Process
    seconds_to_ready: float
    """From the command to the first 200 of /health."""

    def register(self, folders: Sequence[Path]) -> list[str]:
        """Register adapters from the adapter root; returns their names."""
        return register(folders, self.url, _KEY)

    def memory(self) -> Memory:
        """What it takes now."""
        resident = anonymous = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            resident += process.memory_full_info().pss
            status = Path(f"/proc/{process.pid}/status").read_text()
            (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
            anonymous += int(line.split()[1]) * 1024
        return Memory(resident, anonymous)

    def stats(self) -> dict[str, int]:
        """The engine's last snapshot."""
        found: dict[str, int] = httpx.get(f"{self.url}/health").json()["engine"]
        return found


@contextmanager
def serve(model: str, adapter_root: Path, *options: str) -> Iterator[Server]:
    """Start one, and end it."""
    with tempfile.TemporaryDirectory() as home:
        command = [Path(sys.executable).with_name("onebase"), "serve", "--model", model, "--port", "0"]
        command += ["--adapter-root", adapter_root, "--admin-key", _KEY, *options]
        started = time.perf_counter()
        popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"ONEBASE_HOME": home, "COLUMNS": "200"}
        )
        try:
            url = _wait_for_url(popen)
            while httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.01)
            yield Server(url, psutil.Process(popen.pid), time.perf_counter() - started)
        finally:
            popen.terminate()
            popen.communicate()


def _wait_for_url(popen: "subprocess.Popen[str]") -> str:
    said = []
    for line in popen.stderr or ():
        said.append(line)
        if line.split()[:1] == ["url"]:
            return line.split()[1].removesuffix("/v1")
    raise RuntimeError(f"the server did not start:\n{''.join(said)}")
