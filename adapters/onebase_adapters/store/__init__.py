"""Registered adapters: objects by digest, and names with versions."""
