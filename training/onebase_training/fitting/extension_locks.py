"""Locks of extensions that are compiled at their first use, as DeepSpeed's are.

torch marks a compilation by a file named `lock`, and others wait until it is gone. A process that is killed
meanwhile leaves it, and every later run would wait for ever. So ours hold a lock that ends with its process while
they may compile: who holds it alone finds only files that nobody will remove.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


@contextmanager
def extensions() -> Iterator[None]:
    """Extensions may be compiled in here. Forgets those whose compilation died first."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "onebase.lock").open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another one is in here, and has looked
        else:
            for left in root.glob("**/lock"):
                left.unlink(missing_ok=True)
        fcntl.flock(held, fcntl.LOCK_SH)
        yield
