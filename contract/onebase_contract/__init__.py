"""A training run as plain values, without torch: what server and trainer both know of it."""
