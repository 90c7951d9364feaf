"""`onebase serve`."""


def serve() -> None:
    """Serve one base model and its adapters."""
    raise NotImplementedError
