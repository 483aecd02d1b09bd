"""Stages 1 and 3: a program for every window, and one for every query row and block."""
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# ruff: noqa: N803 - capitals are what a kernel is compiled for

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import cu_seqlens_of, lengths_of

from .attend import row_places


@triton.jit
def compress_kernel(
    k,
    first_keys,
    windows,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Average the keys of one window, all heads and channels at once."""
    window = tl.program_id(0)
    tokens = tl.arange(0, SIZE_TILE)
    columns = tl.arange(0, ROW_TILE)
    at = (tl.load(first_keys + window) + tokens)[:, None] * ROW + columns[None, :]
    real = (tokens < SIZE)[:, None] & (columns < ROW)[None, :]
    keys = tl.load(k + at, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(keys, 0) / SIZE
    tl.store(windows + window * ROW + columns, mean, mask=columns < ROW)


def compress_keys(
    *, k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int, **_: object
) -> tuple[Tensor, Tensor]:
    """Mean-pool keys `[total_k, HK, D]` into windows `[total_c, HK, D]`; add `cu_seqlens_c`."""
    counts = [num_windows(n, kernel_size, kernel_stride) for n in lengths_of(cu_seqlens_k)]
    starts = [
        start + c * kernel_stride
        for start, count in zip(cu_seqlens_k.tolist()[:-1], counts, strict=True)
        for c in range(count)
    ]
    first_keys = torch.tensor(starts, dtype=torch.int64, device=k.device)
    windows = k.new_empty(len(starts), *k.shape[1:])
    row = k.shape[1] * k.shape[2]
    if starts:
        compress_kernel[(len(starts),)](
            k,
            first_keys,
            windows,
            SIZE=kernel_size,
            ROW=row,
            SIZE_TILE=triton.next_power_of_2(kernel_size),
            ROW_TILE=triton.next_power_of_2(row),
        )
    return windows, cu_seqlens_of(counts, k.device)


@triton.jit
def pool_kernel(
    scores,
    positions,
    result,
    num_rows,
    num_windows,
    num_blocks,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWS_TILE: tl.constexpr,
    BLOCKS_TILE: tl.constexpr,
):
    """Take the maximum of the visible windows that overlap each block, for one query row."""
    row = tl.program_id(0)
    position = tl.load(positions + row % num_rows)
    blocks = tl.arange(0, BLOCKS_TILE)[:, None]
    before = (SIZE - 1) // STRIDE
    windows = blocks * BLOCK // STRIDE - before + tl.arange(0, WINDOWS_TILE)[None, :]
    ends = windows * STRIDE + SIZE - 1
    there = (windows >= 0) & (windows < num_windows) & (ends <= position)
    there &= (ends >= blocks * BLOCK) & (windows * STRIDE < (blocks + 1) * BLOCK)
    found = tl.load(scores + row * num_windows + windows, mask=there, other=-float("inf"))
    at = row * num_blocks + tl.arange(0, BLOCKS_TILE)
    tl.store(result + at, tl.max(found, 1), mask=tl.arange(0, BLOCKS_TILE) < num_blocks)


def pool_blocks(
    *,
    scores: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    config: SparseConfig,
    **_: object,
) -> Tensor:
    """Pool scores `[HK, total_q, C]` into blocks: `[HK, total_q, N]`."""
    _, positions = row_places(cu_seqlens_q, cu_seqlens_k)
    lengths = lengths_of(cu_seqlens_k)
    blocks = max((num_blocks(n, config.block_size) for n in lengths), default=0)
    result = scores.new_empty(*scores.shape[:2], blocks)
    rows = scores.shape[0] * scores.shape[1]
    most = (config.block_size + config.kernel_size) // config.kernel_stride + 2
    if rows and blocks:
        pool_kernel[(rows,)](
            scores,
            positions,
            result,
            scores.shape[1],
            scores.shape[2],
            blocks,
            SIZE=config.kernel_size,
            STRIDE=config.kernel_stride,
            BLOCK=config.block_size,
            WINDOWS_TILE=triton.next_power_of_2(most),
            BLOCKS_TILE=triton.next_power_of_2(blocks),
        )
    return result
