"""The bodies of requests, one file for each topic."""
