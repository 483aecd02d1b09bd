"""Stage 3: pool the scores of windows into scores of blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .config import SparseConfig
from .geometry import num_blocks, overlapping_windows, paper_eq7_windows
from .score import visible_windows


def pool_blocks(
    scores: Float[Tensor, "HK T C"], num_keys: int, config: SparseConfig
) -> Float[Tensor, "HK T N"]:
    """Give every block the highest score among the visible windows that overlap it.

    `block_score[b] = max(score[c] for c visible and overlapping b)`, and -inf if there is none. For
    windows of 32 tokens every 16 and blocks of 64 these are the windows `4b-1 .. 4b+3`.

    Args:
        scores: the scores of one sequence's windows; those of invisible windows are not read.
        num_keys: S, the key tokens of the sequence.
        config: window length and stride, block size, and the reading of Eq. 7.

    Returns:
        The score of every block, in the dtype of `scores`.

    Free: what stands at blocks after the query's own.

    Source: Eq. 7, read as overlap (decision D5); `config.pooling = "paper_eq7"` is the literal one.
    """
    num_kv_heads, num_queries, num_windows = scores.shape
    size, stride, block_size = config.kernel_size, config.kernel_stride, config.block_size
    windows_of = overlapping_windows if config.pooling == "overlap" else paper_eq7_windows
    visible = visible_windows(num_queries, num_keys, size, stride).to(scores.device)  # [T, C]
    scores = scores.masked_fill(~visible, -torch.inf)  # [HK, T, C]
    shape = num_kv_heads, num_queries, num_blocks(num_keys, block_size)
    block_scores = scores.new_full(shape, -torch.inf)  # [HK, T, N]
    for block in range(shape[-1]):
        first, end = windows_of(block, block_size, size, stride)
        if first < num_windows:
            block_scores[..., block] = scores[..., first:end].amax(dim=-1)
    return block_scores
