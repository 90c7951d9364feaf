"""The server: an engine process that knows tokens and adapters, and an API process that knows HTTP and text."""
