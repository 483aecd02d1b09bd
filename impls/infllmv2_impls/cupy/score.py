"""Stages 2 and 3: scores of windows, summed over the heads of a group, and pooled into blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines, Windows
from infllmv2_reference.config import SparseConfig

from .launch import Kernel, launch
from .lse import LOG2_E
from .tuning import ScoreTile, num_parts, padded_group


def can_pool(config: SparseConfig, windows: int) -> bool:
    """Say whether blocks can be pooled from tiles of so many windows, before scores are stored.

    Windows must lie alike in all blocks, those that reach into a block begin in the one before, and
    one warp must have the blocks of a tile if any do.
    """
    c = config
    if c.pooling != "overlap" or c.block_size % c.kernel_stride or c.kernel_size % c.kernel_stride:
        return False
    per = c.block_size // c.kernel_stride
    extra = c.kernel_size // c.kernel_stride - 1
    return (
        per & (per - 1) == 0
        and per <= windows
        and extra <= per
        and (extra == 0 or windows // per <= 32)
    )


def competing_are_visible(config: SparseConfig) -> bool:
    """Say whether a block that competes lies so far back that all its windows have ended."""
    reach = config.kernel_size - config.kernel_stride  # at most so far behind the block
    return reach - 1 <= (config.local_blocks - 1) * config.block_size


def write_scores(
    q: Tensor,
    windows: Windows,
    lse: Tensor,
    lengths: Lengths,
    config: SparseConfig,
    tile: ScoreTile,
    lines: Lines,
    *,
    pooled: bool,
    covered: int = 0,
    dense_len: int = -1,
) -> None:
    """Write scores of windows, or `pooled` those of blocks, into `lines`.

    Args:
        q: queries `[total_q, HQ, D]`, `aligned` to pairs of channels.
        windows: those of K_C1, `aligned` to 8 channels.
        lse: from `window_lse`.
        lengths: of the batch.
        config: blocks, local blocks.
        tile: from `score_tile`.
        lines: where; contiguous.
        pooled: only blocks that compete are written; their windows must suit `can_pool`.
        covered: rows with at most so many visible blocks may stay unwritten: they select them all.
        dense_len: rows of sequences of fewer keys may stay unwritten.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    steps = -(-lengths.most_windows(config) // tile.windows)
    kernel = Kernel(
        "score.cu",
        "score_kernel",
        (
            ("BF16", int(q.dtype == torch.bfloat16)),
            ("GROUP", group),
            ("GROUP_PAD", padded_group(group)),
            ("D", head_dim),
            ("SIZE", windows.size),
            ("STRIDE", windows.stride),
            ("BLOCK", config.block_size),
            ("POOLED", int(pooled)),
            ("ALL_VISIBLE", int(pooled and competing_are_visible(config))),
            ("BY_SLOT", int(lines.by_slot)),
            ("HEADS", tile.heads),
            ("TOKEN_GROUPS", tile.token_groups),
            ("TILE_WINDOWS", tile.windows),
            ("ROW_TILES", tile.row_tiles),
            ("STAGES", tile.stages),
            ("RESIDENT", tile.resident),
        ),
    )
    launch(
        kernel,
        (lines.slots, num_kv_heads, num_parts(lines.slots * num_kv_heads, steps)),
        tile.threads,
        tile.shared_bytes,
        q,
        q,
        windows.means,
        lse,
        lines.data,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        total_q,
        dense_len,
        covered,
        config.local_blocks,
        lines.first_slot,
        lines.data.shape[1],
        lines.data.shape[2],
        lse.shape[0],
        np.int64(q.stride(0)),
        np.int64(q.stride(1)),
        windows.means.stride(0),
        np.int64(windows.means.stride(1)),
        LOG2_E * head_dim**-0.5,
    )
