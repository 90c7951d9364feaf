"""The command line: `onebase train`, `tune`, `compare`, `evaluate`, `methods` and `data`."""
