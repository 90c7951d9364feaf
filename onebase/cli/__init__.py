"""The `onebase` command: one file for each of its commands."""
