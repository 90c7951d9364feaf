"""Adapters by name: where they come from, which are served, several for one request."""
