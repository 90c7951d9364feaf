"""Where OneBase keeps things on this machine: what may be deleted, and what must survive."""

import os
from pathlib import Path


def cache_home() -> Path:
    """Downloads and conversions, safe to delete: `$ONEBASE_CACHE`, else the user's cache directory."""
    chosen = os.environ.get("ONEBASE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onebase"


def data_home() -> Path:
    """The folder of all that must survive (the adapter store): `$ONEBASE_HOME`, else the user's data directory."""
    chosen = os.environ.get("ONEBASE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "onebase"
