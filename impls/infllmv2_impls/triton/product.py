"""Products of rows and columns in float32, for inputs that the tensor core would round."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_in_steps(
    rows_at, columns_at, rows_valid, columns_valid, D: tl.constexpr, STEP: tl.constexpr
):
    """Return `[M, N]` dot products over the head dim, `STEP` channels at a time.

    Without tensor cores a thread holds whole rows of the factors in registers, so these are cut.

    Args:
        rows_at: pointers to channel 0, `[M, 1]`.
        columns_at: the same, `[1, N]`.
        rows_valid: which rows exist, `[M, 1]`; others count as 0.
        columns_valid: the same, `[1, N]`.
        D: channels.
        STEP: at least 16, a power of two.
    """
    total = tl.zeros([rows_at.shape[0], columns_at.shape[1]], tl.float32)
    for d in range(0, D, STEP):
        dims = d + tl.arange(0, STEP)
        rows_mask = rows_valid & (dims < D)[None, :]
        rows = tl.load(rows_at + dims[None, :], mask=rows_mask, other=0.0)
        columns_mask = columns_valid & (dims < D)[:, None]
        columns = tl.load(columns_at + dims[:, None], mask=columns_mask, other=0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
    return total
