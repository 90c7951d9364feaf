"""The way out: adapters as other programs read them, and whether those then say the same."""
