"""The paged cache: whose block is whose, and the memory behind it."""
