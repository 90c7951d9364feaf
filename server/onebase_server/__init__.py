"""Serving: the HTTP API, fine-tuning jobs, and the process that holds the engine."""
