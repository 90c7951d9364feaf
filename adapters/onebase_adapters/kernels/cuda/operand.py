"""What the kernels' products take their operands as."""

import triton
import triton.language as tl

OPERAND = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
"""Tensor cores take bfloat16 and sum in float32. triton's interpreter would multiply the bits of bfloat16 as if they
were integers: it gets the same numbers in float32."""
