"""Where a text that ends an answer begins: one rule for what the server shows and what the trainer scores."""

from collections.abc import Sequence


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int, str] | None:
    """End and start in `text` of the one of `stops` that is complete first, and that one; of two that end together,
    the longer. None where there is none."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found) if found else None
