"""The model under training: a base with a method on it, over packed rows."""
