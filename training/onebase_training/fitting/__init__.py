"""Fitting: the optimiser's loop, its checkpoints, and how it is spread over processes."""
