"""The kernels for CPUs, compiled by numba: no compiler needed on the machine, LLVM comes in its wheel.

What is compiled is kept on disk under a name made of all these sources. numba alone looks only at the file that a
kernel stands in, and would go on running what it once compiled of another file's helpers.
"""

import hashlib
from pathlib import Path

import numba

from onebase_adapters.paths import cache_home


def _cache_folder() -> Path:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in [here.parent / "block.py", *sorted(here.glob("*.py"))]:
        digest.update(source.read_bytes())
    return Path(numba.config.CACHE_DIR or cache_home() / "kernels") / digest.hexdigest()[:16]


numba.config.CACHE_DIR = str(_cache_folder())
