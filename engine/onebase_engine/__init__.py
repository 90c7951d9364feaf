"""One frozen base and all adapters in one batch: scheduler, paged cache, runner, sampler. No HTTP, no command."""
