"""Choosing tokens, and what is read off a prompt beside them."""
