"""ARCHITECTURE.md mirrors the code: a line for every module, and none for one that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "adapters/onebase_adapters",
    "server/onebase_server",
    "training/onebase_training",
    "clients/python/onebase_client",
    "examples",
    "benchmarks",
)


def listed() -> set[str]:
    """Paths that the map names."""
    found = set()
    package = folder = ""
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"### `([^`]+)`", line):
            package, folder = heading[1], ""
        elif inner := re.match(r"\*\*`([^`]+)/`\*\*", line):
            folder = inner[1] + "/"
        elif entry := re.match(r"- `([\w.]+\.py)`: \S", line):
            found.add(f"{package}/{folder}{entry[1]}")
    return found


def test_every_module_has_its_line() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == modules
