"""The training process: steps back behind the server, then becomes `onebase train`.

    python -m onebase_server.jobs.job_process '{"nice": 19, "threads": 2, "memory": null}' --data ... --output ...

It ends with the server, however that ends: a run that was cut short goes on from its last checkpoint.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Read the limits, apply them, train."""
    limits = json.loads(sys.argv[1])
    # Ctrl-C, and what systemd sends, reach all processes; the server decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # When memory runs out, better this one than the server. Asks for no privilege.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
        if limits["memory"] is not None:
            # Data, not address space: libraries and files that are only mapped take none of it.
            psutil.Process().rlimit(psutil.RLIMIT_DATA, (limits["memory"], limits["memory"]))
    os.nice(limits["nice"])
    if limits["threads"] is not None:
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(limits["threads"])
    if os.getppid() == 1:  # the server ended before it could be watched
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "onebase.cli.main", "train", *sys.argv[2:]])


if __name__ == "__main__":
    main()
