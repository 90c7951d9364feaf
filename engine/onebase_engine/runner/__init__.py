"""The base model made ready to serve: its linear sites and attention hooked, nothing of it rewritten."""
