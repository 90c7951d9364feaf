"""Adapters on disk: what PEFT writes and what we add, read and checked."""
