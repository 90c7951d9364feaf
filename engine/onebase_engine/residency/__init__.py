"""Which adapters are in memory, and bringing in those that are not."""
