"""bitsandbytes, imported cheaply: import it from here first.

At import it prepares for torch.compile what it would use on a device that it has no kernels for. Nobody here runs
on one, and torch's compiler costs a second of every start and 40 MB for as long as the process lives.
"""

from collections.abc import Callable
from typing import Any

import torch


def _leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    return function if function is not None else _leave


_compile = torch.compile
torch.compile = _leave  # type: ignore[assignment]
try:
    from bitsandbytes.nn import Linear4bit, Params4bit
finally:
    torch.compile = _compile

__all__ = ["Linear4bit", "Params4bit"]
