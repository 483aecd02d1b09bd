"""Stage 3 on its own: the highest stored score of the windows of each block, for any geometry."""

from __future__ import annotations

import numpy as np

from infllmv2_impls.packing import Lengths, Lines
from infllmv2_reference.config import SparseConfig

from .launch import Kernel, launch

THREADS = 128
SPAN = 1024
"""Blocks of a line that one block of threads pools."""


def pool_scores(
    scores: Lines, pooled: Lines, lengths: Lengths, config: SparseConfig, dense_len: int = -1
) -> None:
    """Pool the scores of windows in `scores` into those of blocks, in `pooled`.

    Blocks behind a query's own stay unwritten.

    Args:
        scores: of unit stride in the last axis; those of invisible windows are not read.
        pooled: the same lines, contiguous.
        lengths: of the batch.
        config: block and window sizes, and the reading of Eq. 7.
        dense_len: rows of sequences of fewer keys may stay unwritten.
    """
    num_heads, lines, blocks = pooled.data.shape
    kernel = Kernel(
        "pool.cu",
        "pool_kernel",
        (
            ("SIZE", config.kernel_size),
            ("STRIDE", config.kernel_stride),
            ("BLOCK", config.block_size),
            ("LITERAL", int(config.pooling == "paper_eq7")),
            ("BY_SLOT", int(pooled.by_slot)),
        ),
    )
    launch(
        kernel,
        (pooled.slots * pooled.tile, -(-blocks // SPAN), num_heads),
        THREADS,
        0,
        pooled.data,
        scores.data,
        pooled.data,
        lengths.ends_q,
        lengths.ends_k,
        lengths.batch,
        dense_len,
        pooled.first_slot,
        pooled.slots,
        pooled.tile,
        lines,
        blocks,
        SPAN,
        np.int64(scores.data.stride(0)),
        np.int64(scores.data.stride(1)),
    )
