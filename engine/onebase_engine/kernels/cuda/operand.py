"""The form in which the kernels' products take their operands."""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)

OPERAND = tl.float32 if INTERPRETED else tl.bfloat16
"""Tensor cores take bfloat16 and sum in float32. The interpreter, which would multiply its bits as integers, gets
the same numbers in float32."""
