"""The engine: scheduler, paged cache, runner and sampler in a process of their own. No HTTP, no text."""
