"""Stage 1: means of windows of keys, and where the windows of every sequence lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.packing import num_slots

from .device import launching_on, unit_stride
from .sequences import find_tile, num_windows
from .tuning import compress_tile, padded_dim


@triton.jit
def _count_windows(ends_k, first, end, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Return the windows of 128 sequences from `first` on; none of those from `end` on."""
    sequence = first + tl.arange(0, 128)
    valid = sequence < end
    start = tl.load(ends_k + sequence, mask=valid, other=0)
    return num_windows(tl.load(ends_k + sequence + 1, mask=valid, other=0) - start, SIZE, STRIDE)


@triton.jit
def _write_ends(ends_k, ends_c, batch, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Write the cumulative numbers of windows, `[batch + 1]`."""
    tl.store(ends_c, 0)
    total = 0
    for first in range(0, batch, 128):
        counts = _count_windows(ends_k, first, batch, SIZE, STRIDE)
        sequence = first + tl.arange(0, 128)
        ends = total + tl.cumsum(counts, axis=0)
        tl.store(ends_c + 1 + sequence, ends, mask=sequence < batch)
        total += tl.sum(counts, axis=0)


@triton.jit
def average(
    at,
    exists,
    row_stride,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Return the float32 means of `SIZE` rows from each pointer of `at` on, `[WINDOWS, D_PAD]`."""
    token = tl.arange(0, AT_ONCE)[None, :, None]
    dims = tl.arange(0, D_PAD)[None, None, :]
    rows_at = at[:, None, None] + token * row_stride + dims
    valid = exists[:, None, None] & (dims < D)
    total = tl.zeros([at.shape[0], AT_ONCE, D_PAD], tl.float32)
    for i in range(0, SIZE, AT_ONCE):
        rows = tl.load(rows_at + i * row_stride, mask=valid & (i + token < SIZE), other=0.0)
        total += rows.to(tl.float32)
    return tl.sum(total, axis=1) / SIZE


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
    """Average the windows of one head that begin in a tile of keys; one program writes the ends."""
    head = tl.program_id(1).to(tl.int64)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        _write_ends(ends_k, ends_c, batch, SIZE, STRIDE)
    sequence, start, rows, first = find_tile(tl.program_id(0), ends_k, batch, WINDOWS * STRIDE)
    window = first // STRIDE + tl.arange(0, WINDOWS)
    count = num_windows(rows, SIZE, STRIDE)
    if first // STRIDE >= count:
        return
    before = 0  # windows of the sequences before
    for j in range(0, sequence, 128):
        before += tl.sum(_count_windows(ends_k, j, sequence, SIZE, STRIDE), axis=0)
    token = start + window.to(tl.int64) * STRIDE
    at = k + token * k_row_stride + head * k_head_stride
    mean = average(at, window < count, k_row_stride, D, D_PAD, SIZE, AT_ONCE)
    dims = tl.arange(0, D_PAD)
    line = (before + window.to(tl.int64)) * tl.num_programs(1) + head
    out = means + line[:, None] * D + dims[None, :]
    mask = (window < count)[:, None] & (dims < D)[None, :]
    tl.store(out, mean.to(means.dtype.element_ty), mask=mask)


def compress_keys(
    k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows `[total_k // kernel_stride, HK, D]`, and their `cu_seqlens_c`.

    No batch of so many keys has more windows; rows behind the last window stay unwritten.
    """
    k = unit_stride(k)
    batch, (total_k, num_heads, head_dim) = len(cu_seqlens_k) - 1, k.shape
    shape = (total_k // kernel_stride, num_heads, head_dim)
    means = torch.empty(shape, dtype=k.dtype, device=k.device)
    if not means.numel():
        return means, torch.zeros_like(cu_seqlens_k)
    ends = torch.empty_like(cu_seqlens_k)
    windows, at_once = compress_tile(head_dim, kernel_size)
    with launching_on(k):
        compress_kernel[num_slots(total_k, batch, windows * kernel_stride), num_heads](
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
