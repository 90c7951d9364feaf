"""A quick part of the suite with the lowest or the newest versions that pyproject.toml allows, in an environment of
its own that is made anew each time: `make test-lowest`, `make test-newest`.

Lowest: everything that pyproject.toml names at its lower bound, and torch as constraints.txt has it; TORCH=2.11.0
asks for another one. For Linux PyPI has torch with CUDA alone, gigabytes, so that no other comes unasked.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ["tests/adapters", "tests/api", "tests/client", "tests/engine", "tests/parity/test_options.py"]
QUICK += ["tests/parity/test_fused.py", "tests/parity/test_heads.py", "tests/training/test_train_packing.py"]
QUICK += ["tests/training/test_options.py", "tests/training/test_train_fsdp.py"]
EXTRAS = ("dev", "demo")


def lowest() -> list[str]:
    """Each requirement at its lower bound; torch as TORCH or constraints.txt say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["dependencies"] + [one for extra in EXTRAS for one in project["optional-dependencies"][extra]]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in named)
    known = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    bounds["torch"] = os.environ.get("TORCH") or known[1]
    return [f"{name}=={version}" for name, version in bounds.items()]


def main() -> int:
    """Returns pytest's status."""
    which = sys.argv[1]
    folder = ROOT / ".venv" / which
    folder.parent.mkdir(exist_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"
    torch = f"torch=={os.environ['TORCH']}" if "TORCH" in os.environ else "torch"
    constraints.write_text("".join(f"{one}\n" for one in (lowest() if which == "lowest" else [])))
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "--progress-bar", "on", "-c", str(constraints)]
    subprocess.run([*install, torch], check=True)
    subprocess.run(
        [*install, "-e", f"{ROOT}[{','.join(EXTRAS)}]", "-e", str(ROOT / "clients" / "python")], check=True
    )
    subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], check=True)
    # A warning of a version that is not ours to choose is no failure.
    return subprocess.run([python, "-m", "pytest", "-W", "default", *QUICK], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
