"""What an adapter is: methods, their lowering to primitives, files, store, kernels, and their base."""

import logging

# bitsandbytes warns at import that an optional kernel from a hub is absent; its built-in one is what we use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
