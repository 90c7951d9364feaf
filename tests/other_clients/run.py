"""Clients that others wrote, each driving the server as its users do. `make clients` runs it.

python tests/other_clients/run.py PYTHON_THAT_HAS_THEM
"""

import shutil
import sys
from pathlib import Path

from support.fake_server import run_beside

HERE = Path(__file__).parent


def main() -> int:
    """Returns 0 if all went well."""
    commands = [
        [sys.argv[1], str(HERE / name)] for name in ("with_litellm.py", "with_langchain.py", "with_lm_eval.py")
    ]
    if shutil.which("node") and (HERE / "node_modules").is_dir():
        commands.append(["node", str(HERE / "with_node.mjs")])
    else:
        print("without node, or without `npm install` in tests/other_clients: its client is left out")
    return run_beside(*commands)


if __name__ == "__main__":
    sys.exit(main())
