"""Client for a OneBase server."""
