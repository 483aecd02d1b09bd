"""Stage 4: choose the blocks that every query attends."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .config import SparseConfig
from .geometry import first_position, is_forced, num_selected


def select_blocks(
    block_scores: Float[Tensor, "HK T N"], num_keys: int, config: SparseConfig
) -> Int[Tensor, "HK T K"]:
    """Choose the forced blocks, then fill the budget with the best-scored visible ones.

    Blocks of equal score are taken in the order of their index (decision D7).

    Args:
        block_scores: the scores of one sequence's blocks; those of forced blocks and of blocks
            after the query's own are not read.
        num_keys: S, the key tokens of the sequence.
        config: block size, initial and local blocks, and the budget K.

    Returns:
        Int32 block indices, strictly ascending and followed by -1 where fewer than K are visible.

    Free: nothing. Fused implementations that compute the scores themselves are free among blocks
    whose scores differ by less than their declared arithmetic can tell.

    Source: Eq. 2 and 3 (decisions D6, D7).
    """
    num_kv_heads, num_queries, _ = block_scores.shape
    shape = num_kv_heads, num_queries, config.budget
    selected = torch.full(shape, -1, dtype=torch.int32, device=block_scores.device)
    for row, position in enumerate(range(first_position(num_queries, num_keys), num_keys)):
        for head in range(num_kv_heads):
            blocks = _select_row(block_scores[head, row].tolist(), position, config)
            selected[head, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return selected


def _select_row(scores: list[float], position: int, c: SparseConfig) -> list[int]:
    """Return the blocks that the query at `position` selects, ascending."""
    own = position // c.block_size
    forced = [
        block
        for block in range(own + 1)
        if is_forced(block, position, c.block_size, c.init_blocks, c.local_blocks)
    ]
    others = [block for block in range(own + 1) if block not in forced]
    best_first = sorted(others, key=lambda block: (-scores[block], block))
    count = num_selected(position, c.block_size, c.init_blocks, c.local_blocks, c.budget)
    return sorted(forced + best_first[: count - len(forced)])
