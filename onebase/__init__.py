"""OneBase: one frozen 4-bit base, any number of adapters, served in one batch and trained."""
