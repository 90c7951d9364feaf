"""A message's content in parts: training and serving join their texts in one way."""

from collections.abc import Iterable


def joined(texts: Iterable[str]) -> str:
    """As lines, as vLLM does."""
    return "\n".join(texts)
