"""Stage 1: means of windows of keys, and where the windows of every sequence lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launching_on, unit_stride
from .sequences import find_tile, num_slots, num_windows
from .tuning import padded_dim, compress_tile


@triton.jit(do_not_specialize=["batch"])
def window_ends_kernel(
    ends_k,
    ends_c,
    batch,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the cumulative numbers of windows, `[batch + 1]`; one program."""
    tl.store(ends_c, 0)
    total = 0
    for first in range(0, batch, CHUNK):
        at = first + tl.arange(0, CHUNK)
        inside = at < batch
        start = tl.load(ends_k + at, mask=inside, other=0)
        end = tl.load(ends_k + at + 1, mask=inside, other=0)
        counts = num_windows(end - start, SIZE, STRIDE)
        tl.store(ends_c + 1 + at, total + tl.cumsum(counts, axis=0), mask=inside)
        total += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["batch"])
def compress_kernel(
    k,
    means,
    ends_k,
    ends_c,
    batch,
    k_row_stride,
    k_head_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Average a tile of windows of one head; sums are float32, token after token."""
    head = tl.program_id(1)
    sequence, start, rows, first = find_tile(tl.program_id(0), ends_c, batch, WINDOWS)
    if first >= rows:
        return
    row = tl.arange(0, WINDOWS)
    dims = tl.arange(0, D_PAD)
    valid = (first + row < rows)[:, None] & (dims < D)[None, :]
    token = tl.load(ends_k + sequence).to(tl.int64) + first.to(tl.int64) * STRIDE
    at = k + token * k_row_stride + head * k_head_stride
    at += (row.to(tl.int64) * (STRIDE * k_row_stride))[:, None] + dims[None, :]
    total = tl.zeros([WINDOWS, D_PAD], tl.float32)
    for i in range(SIZE):
        total += tl.load(at + i * k_row_stride, mask=valid, other=0.0).to(tl.float32)
    line = (start + first).to(tl.int64) * tl.num_programs(1) + head
    out = means + line * D + (row * (tl.num_programs(1) * D))[:, None] + dims[None, :]
    tl.store(out, (total / SIZE).to(means.dtype.element_ty), mask=valid)


def compress_keys(
    k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows `[total_k // kernel_stride, HK, D]`, and their `cu_seqlens_c`.

    No batch of so many keys has more windows; rows behind the last window are 0.
    """
    k = unit_stride(k)
    batch, (total_k, num_heads, head_dim) = len(cu_seqlens_k) - 1, k.shape
    rows = total_k // kernel_stride
    means = torch.zeros((rows, num_heads, head_dim), dtype=k.dtype, device=k.device)
    ends = torch.empty_like(cu_seqlens_k)
    tile = compress_tile(rows)
    with launching_on(k):
        window_ends_kernel[(1,)](
            cu_seqlens_k, ends, batch, SIZE=kernel_size, STRIDE=kernel_stride, CHUNK=1024
        )
        if rows:
            compress_kernel[num_slots(rows, batch, tile), num_heads](
                k,
                means,
                cu_seqlens_k,
                ends,
                batch,
                k.stride(0),
                k.stride(1),
                D=head_dim,
                D_PAD=padded_dim(head_dim),
                SIZE=kernel_size,
                STRIDE=kernel_stride,
                WINDOWS=tile,
                num_warps=4,
            )
    return means, ends
