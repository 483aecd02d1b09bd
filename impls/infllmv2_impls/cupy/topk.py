"""Stage 4: the forced blocks and the best-scored ones, ascending."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines
from infllmv2_reference.config import SparseConfig

from .launch import Kernel, launch
from .tuning import topk_tile


def write_selection(
    scores: Lines, selected: Tensor, lengths: Lengths, config: SparseConfig, dense_len: int = -1
) -> None:
    """Select by the scores of blocks, into `selected`, int32 `[HK, total_q, budget]`.

    Args:
        scores: of unit stride in the last axis; what is read around those of blocks that compete,
            less than 16 bytes, has no effect.
        selected: contiguous.
        lengths: of the batch.
        config: block size, initial and local blocks, budget.
        dense_len: sequences of fewer keys get -1.
    """
    num_heads, total_q, budget = selected.shape
    lines = scores.slots * scores.tile
    tile = topk_tile(lengths.most_blocks(config), num_heads * lines)
    kernel = Kernel(
        "topk.cu",
        "topk_kernel",
        (
            ("BLOCK", config.block_size),
            ("BY_SLOT", int(scores.by_slot)),
            ("TILE", scores.tile),
            ("WARPS", tile.warps),
            ("ROWS", tile.rows),
        ),
    )
    launch(
        kernel,
        (-(-lines // tile.rows), num_heads, 1),
        32 * tile.warps * tile.rows,
        0,
        selected,
        scores.data,
        selected,
        lengths.ends_q,
        lengths.ends_k,
        lengths.batch,
        total_q,
        dense_len,
        config.init_blocks,
        config.local_blocks,
        budget,
        scores.first_slot,
        scores.slots,
        np.int64(_extent(scores.data)),
        np.int64(scores.data.stride(0)),
        np.int64(scores.data.stride(1)),
    )


def _extent(x: Tensor) -> int:
    """Return how far behind the first element the last one ends."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
