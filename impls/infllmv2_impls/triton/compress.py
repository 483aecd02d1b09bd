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
    AT_ONCE: tl.constexpr,
):
    """Average a tile of windows of one head, `AT_ONCE` tokens of each at a time, in float32."""
    head = tl.program_id(1).to(tl.int64)
    sequence, start, rows, first = find_tile(tl.program_id(0), ends_c, batch, WINDOWS)
    if first >= rows:
        return
    window = tl.arange(0, WINDOWS)
    token = tl.arange(0, AT_ONCE)[None, :, None]
    dims = tl.arange(0, D_PAD)
    exists = (first + window < rows)[:, None, None] & (dims < D)[None, None, :]
    begin = tl.load(ends_k + sequence).to(tl.int64) + first.to(tl.int64) * STRIDE
    at = k + begin * k_row_stride + head * k_head_stride
    at += (window * STRIDE)[:, None, None].to(tl.int64) * k_row_stride
    at += token * k_row_stride + dims[None, None, :]
    total = tl.zeros([WINDOWS, AT_ONCE, D_PAD], tl.float32)
    for i in range(0, SIZE, AT_ONCE):
        keys = tl.load(at + i * k_row_stride, mask=exists & (i + token < SIZE), other=0.0)
        total += keys.to(tl.float32)
    mean = tl.sum(total, axis=1) / SIZE
    line = (start + first).to(tl.int64) * tl.num_programs(1) + head
    out = means + line * D + (window * (tl.num_programs(1) * D))[:, None] + dims[None, :]
    mask = (first + window < rows)[:, None] & (dims < D)[None, :]
    tl.store(out, mean.to(means.dtype.element_ty), mask=mask)


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
    windows, at_once = compress_tile(head_dim, kernel_size)
    with launching_on(k):
        window_ends_kernel[(1,)](
            cu_seqlens_k, ends, batch, SIZE=kernel_size, STRIDE=kernel_stride, CHUNK=1024
        )
        if rows:
            compress_kernel[num_slots(rows, batch, windows), num_heads](
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
                WINDOWS=windows,
                AT_ONCE=at_once,
                num_warps=4,
            )
    return means, ends
