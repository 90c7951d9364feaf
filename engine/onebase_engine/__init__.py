"""One frozen base and all adapters in one batch: scheduler, paged cache, runner, sampler. No HTTP, no command."""

import logging

# bitsandbytes warns at import that an optional kernel from a hub is absent; its built-in one is what we use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
