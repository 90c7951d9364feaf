"""All of bitsandbytes that is used, imported without torch's compiler: nothing else here imports it."""

from onebase_engine.kernels.lean_imports import without_compiler

with without_compiler():
    from bitsandbytes.functional import (
        QuantState,
        _convert_weight_packed_for_cpu_inverse,
        dequantize_4bit,
        dequantize_blockwise,
        get_4bit_type,
        has_avx512bf16,
    )
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.optim import PagedAdamW32bit

unpack_for_cpu = _convert_weight_packed_for_cpu_inverse

__all__ = [
    "Linear4bit",
    "PagedAdamW32bit",
    "Params4bit",
    "QuantState",
    "dequantize_4bit",
    "dequantize_blockwise",
    "get_4bit_type",
    "has_avx512bf16",
    "unpack_for_cpu",
]
