"""Which blocks are visible, forced and competing, for all queries of a sequence at once.

`geometry.py` of the reference says the same one integer at a time; a test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import Span


def positions(span: Span) -> Tensor:
    """Return the position of every query, `[T]`."""
    return torch.arange(span.num_keys - span.num_queries, span.num_keys)


def visible_blocks(span: Span, config: SparseConfig) -> Tensor:
    """Say which blocks begin no later than each query's own, `[T, N]`."""
    blocks = torch.arange(num_blocks(span.num_keys, config.block_size))
    return blocks <= (positions(span) // config.block_size)[:, None]


def forced_blocks(span: Span, config: SparseConfig) -> Tensor:
    """Say which blocks each query attends whatever their scores, `[T, N]`."""
    blocks = torch.arange(num_blocks(span.num_keys, config.block_size))
    own = (positions(span) // config.block_size)[:, None]
    local = blocks > own - config.local_blocks
    return visible_blocks(span, config) & (local | (blocks < config.init_blocks))


def competing_blocks(span: Span, config: SparseConfig) -> Tensor:
    """Say which blocks are selected by their score, `[T, N]`."""
    return visible_blocks(span, config) & ~forced_blocks(span, config)


def members(selected: Tensor, blocks: int) -> Tensor:
    """Turn selections `[..., K]` (with -1) into membership `[..., N]`."""
    flags = torch.zeros(*selected.shape[:-1], blocks + 1, dtype=torch.bool)
    ids = selected.long().where(selected >= 0, blocks)
    return flags.scatter(-1, ids, True)[..., :blocks]


def unread_tokens(selected: Tensor, span: Span, block_size: int) -> Tensor:
    """Say which tokens lie in a block that no row of `selected` `[HK, T, K]` has, `[S]`."""
    unread = ~members(selected, num_blocks(span.num_keys, block_size)).any(0).any(0)
    return unread.repeat_interleave(block_size)[: span.num_keys]


def doubles(out: Tensor) -> Tensor:
    """Say where a rounded output must double with its exact value.

    The spacing of numbers doubles with them only from the smallest normal number on. An output that
    is this very number may have been rounded up to it, and its double lies among closer numbers.
    """
    return out.abs() > torch.finfo(out.dtype).tiny
