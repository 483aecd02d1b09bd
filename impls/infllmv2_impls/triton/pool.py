"""Stage 3 on its own: the highest stored score of the windows of each block, for any geometry."""

from __future__ import annotations

import triton
import triton.language as tl

from infllmv2_impls.packing import Lengths, Lines
from infllmv2_reference.config import SparseConfig

from .device import launching_on
from .sequences import find_tile, length, num_windows
from .tuning import pool_tile


@triton.jit(do_not_specialize=["batch", "dense_len", "first_slot", "lines", "blocks"])
def pool_kernel(
    scores,
    pooled,
    ends_q,
    ends_k,
    batch,
    dense_len,
    first_slot,
    lines,
    blocks,
    score_head_stride,
    score_line_stride,
    pooled_line_stride,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LITERAL: tl.constexpr,
    BY_SLOT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write `ROWS` lines of `BLOCKS` block scores of one head; -inf without a visible window."""
    head = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) // (TILE // ROWS)
    sequence, start, rows, first = find_tile(first_slot + slot, ends_q, batch, TILE)
    part = tl.program_id(0) % (TILE // ROWS) * ROWS
    num_keys = length(ends_k, sequence)
    if (first + part >= rows) | (num_keys < dense_len):
        return
    row = part + tl.arange(0, ROWS)
    position = num_keys - rows + first + row
    visible = num_windows(position + 1, SIZE, STRIDE)
    line = (slot * TILE if BY_SLOT else start + first) + row.to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    if LITERAL:
        begin = block * BLOCK // STRIDE
        end = begin + (BLOCK + SIZE) // STRIDE - 1
        COUNT: tl.constexpr = (BLOCK + SIZE) // STRIDE - 1
    else:
        # Window c reaches the block if c * STRIDE + SIZE > start, and begins in or before it.
        reach = block * BLOCK - SIZE
        begin = tl.where(reach >= 0, reach // STRIDE + 1, 0)
        end = tl.cdiv((block + 1) * BLOCK, STRIDE)
        COUNT: tl.constexpr = (BLOCK + SIZE) // STRIDE + 1
    at = scores + head * score_head_stride + (line * score_line_stride)[:, None]
    best = tl.full([ROWS, BLOCKS], float("-inf"), tl.float32)
    inside = (first + row < rows)[:, None]
    for i in range(COUNT):
        window = (begin + i)[None, :]
        mask = inside & (window < end[None, :]) & (window < visible[:, None])
        best = tl.maximum(best, tl.load(at + window, mask=mask, other=float("-inf")))
    out = pooled + (head * lines + line)[:, None] * pooled_line_stride + block[None, :]
    tl.store(out, best, mask=inside & (block < blocks)[None, :])


def pool_scores(
    scores: Lines, pooled: Lines, lengths: Lengths, config: SparseConfig, dense_len: int = -1
) -> None:
    """Pool the scores of windows in `scores` into those of blocks, in `pooled`.

    Args:
        scores: of unit stride in the last axis; those of invisible windows are not read.
        pooled: the same lines, contiguous.
        lengths: of the batch.
        config: block and window sizes, and the reading of Eq. 7.
        dense_len: rows of sequences of fewer keys may stay unwritten.
    """
    num_heads, _, blocks = pooled.data.shape
    tile = pooled.tile
    rows, columns = pool_tile(tile)
    grid = (pooled.slots * (tile // rows), triton.cdiv(blocks, columns), num_heads)
    if not grid[0] or not grid[1]:
        return
    with launching_on(pooled.data):
        pool_kernel[grid](
            scores.data,
            pooled.data,
            lengths.ends_q,
            lengths.ends_k,
            lengths.batch,
            dense_len,
            pooled.first_slot,
            pooled.data.shape[1],
            blocks,
            scores.data.stride(0),
            scores.data.stride(1),
            pooled.data.stride(1),
            SIZE=config.kernel_size,
            STRIDE=config.kernel_stride,
            BLOCK=config.block_size,
            LITERAL=config.pooling == "paper_eq7",
            BY_SLOT=pooled.by_slot,
            TILE=tile,
            ROWS=rows,
            BLOCKS=columns,
            num_warps=4,
        )
