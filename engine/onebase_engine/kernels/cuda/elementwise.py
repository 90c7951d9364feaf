"""Small operations on rows by slot."""

import torch
import triton
import triton.language as tl

from onebase_engine.kernels.cpu.tables import Vectors

_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _affine_rows(
    y: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    shifts: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Program (row, block of columns). `scales` and `shifts` [slots]: addresses of float32 [width], or 0."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    scale, shift = tl.load(scales + slot), tl.load(shifts + slot)
    if (scale != 0) | (shift != 0):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        target = y + row * width + column
        values = tl.load(target, mask=inside, other=0.0)
        if scale != 0:
            factors = tl.load(scale.to(tl.pointer_type(tl.float32)) + column, mask=inside, other=0.0)
            values = (values.to(tl.float32) * factors).to(y.dtype.element_ty)
        if shift != 0:
            terms = tl.load(shift.to(tl.pointer_type(tl.float32)) + column, mask=inside, other=0.0)
            values = (values.to(tl.float32) + terms).to(y.dtype.element_ty)
        tl.store(target, values, mask=inside)


def affine_rows(y: torch.Tensor, slots: torch.Tensor, scales: Vectors, shifts: Vectors) -> None:
    """As `reference.affine_rows`; `slots` [rows] int32 on the device of y."""
    rows, width = y.shape
    _affine_rows[rows, triton.cdiv(width, _COLUMNS)](
        y, slots, scales.addresses_on_device(), shifts.addresses_on_device(), width, COLUMNS=_COLUMNS
    )
