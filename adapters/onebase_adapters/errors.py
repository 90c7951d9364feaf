"""Every error that OneBase raises on purpose, as one tree.

The tree is the documentation: catch `OneBaseError` for all of them, or a branch for a kind of cause. Each
message names what was wrong and the way out; `field` names the input that carried it, where there is one.
"""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Words, in brackets, for the known name that may have been meant; nothing if none is near."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class OneBaseError(Exception):
    """Root of the tree. `field` is the offending input's name (a request field, a config key), or None."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class BaseModelError(OneBaseError):
    """The base model cannot be found, read or quantised."""


class DownloadError(BaseModelError):
    """A file could not be fetched, or what arrived has the wrong hash."""


class StorageError(OneBaseError):
    """The disk refused: full, read-only, or no permission. Nothing half-written is left behind."""


class UploadError(OneBaseError):
    """A hub does not take what was written, which stays: no token or a wrong one, no network, a refusal."""


class DataError(OneBaseError):
    """A data file is not what it should be; the message has the line number where there is one."""


class ConfigError(OneBaseError):
    """A setting, or a combination of settings, that cannot work."""


class AdapterError(OneBaseError):
    """Something is wrong with an adapter; the branches say what."""


class AdapterFormatError(AdapterError):
    """The files are not a safe, complete adapter: a pickle, a missing tensor, NaN, an unknown method."""


class AdapterMismatchError(AdapterError):
    """A sound adapter, but for another base: wrong shapes, unknown sites, another fingerprint."""


class AdapterPathError(AdapterError):
    """The path to register from is outside the allowed root, or holds no adapter."""


class AdapterExistsError(AdapterError):
    """The name is taken."""


class AdapterNotFoundError(AdapterError):
    """No adapter has this name."""
