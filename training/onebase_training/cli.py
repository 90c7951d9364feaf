"""`onebase train`."""


def train() -> None:
    """Train an adapter."""
    raise NotImplementedError
