"""A training job's own process: it steps back behind the server that started it, trains, and tells of it in events.

    python -m onebase_training.job_process '{"settings": {"data": ..., "output": ...}, "limits": {"nice": 19, ...}}'

It ends with the server, however that ends: a run that was cut short goes on from its last checkpoint.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from onebase_adapters.errors import OneBaseError
from onebase_contract.events import Failed, json_lines
from onebase_contract.job_order import Ending, JobOrder, Limits
from onebase_contract.written_settings import read_settings

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Carry out the order that the command line gives."""
    order = JobOrder.from_json(sys.argv[1])
    _step_back(order.limits)
    from onebase_training.training_run import train  # torch reads the number of threads when it is imported

    with json_lines(sys.stdout) as tell:
        try:
            train(read_settings(order.settings), tell)
        except OneBaseError as error:
            tell(Failed(error.message))
            sys.exit(Ending.FAILED)


def _step_back(limits: Limits) -> None:
    # Ctrl-C, and what systemd sends, reach all processes; the server decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # When memory runs out, better this one than the server. Asks for no privilege.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
        if limits.memory is not None:
            # Data, not address space: libraries and files that are only mapped take none of it.
            psutil.Process().rlimit(psutil.RLIMIT_DATA, (limits.memory, limits.memory))
    os.nice(limits.nice)
    if limits.threads is not None:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(limits.threads)
    if os.getppid() == 1:  # the server ended before it could be watched
        sys.exit(Ending.FAILED)


if __name__ == "__main__":
    main()
