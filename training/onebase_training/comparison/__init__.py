"""Several runs on the same data: methods beside each other, and a search for settings."""
