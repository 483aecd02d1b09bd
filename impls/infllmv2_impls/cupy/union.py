"""What a tile of neighbouring query tokens attends together: the union of their selected blocks.

A *tile* is a run of consecutive query tokens of one sequence whose positions begin at a multiple of
the tile's size. A *piece* is a run of consecutive keys that a kernel multiplies at once: a block,
or an equal part of one. Neighbours share most of what they selected, so a kernel that walks over
the union, with one bit per token and piece, loads every piece once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infllmv2_reference.geometry import num_blocks

from .launch import Kernel, launch

FIELDS = 6
"""Numbers that `Union.tiles` says of a tile; see there."""
THREADS = 128
WINDOW = 8192
"""Pieces that are marked at once: 32 KiB of shared memory, so that many tiles are in flight."""


@dataclass(frozen=True)
class Union:
    """List the pieces of every tile, the latest first.

    Args:
        tiles: int32 `[tiles, FIELDS]`: (0) the row of `q` and (1) the position of the tile's first
            token, which may lie before the sequence; (2) the position of the sequence's first
            query; (3) how many keys the sequence has; (4) the row of its first key; (5) whether it
            attends everything.
        counts: how many pieces a tile attends, int32 `[HK, tiles]`.
        pieces: their indices in the sequence, int32 `[HK, tiles, capacity]`. Rows of dense tiles
            are not written: these attend all pieces from `counts - 1` down to 0.
        members: bit i says whether token i attends the piece, int32, as `pieces`. The entry behind
            the last one has all bits set.
        tokens: tokens of a tile.
        piece: keys of a piece.
    """

    tiles: Tensor
    counts: Tensor
    pieces: Tensor
    members: Tensor
    tokens: int
    piece: int

    @property
    def num_tiles(self) -> int:
        """Return how many tiles there are, those without tokens included."""
        return self.tiles.shape[0]

    @property
    def capacity(self) -> int:
        """Return the distance of the lists of two tiles."""
        return self.pieces.shape[2]


def unite(
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_size: int,
    dense_len: int,
    tokens: int,
    piece: int,
) -> Union:
    """Unite the selections `[HK, total_q, K]` of the tokens of every tile.

    Blocks that do not exist or begin after the token are left out, so that whatever `selected`
    holds, nothing outside the sequence is listed.

    Args:
        selected: block indices, int32; rows of sequences with fewer than `dense_len` keys are not
            read.
        cu_seqlens_q: int32 `[batch + 1]`, contiguous.
        cu_seqlens_k: int32 `[batch + 1]`, contiguous.
        max_seqlen_k: at least the keys of the longest sequence.
        block_size: B, a multiple of `piece`.
        dense_len: sequences with fewer keys attend everything.
        tokens: tokens of a tile, at most 32.
        piece: keys of a piece.
    """
    kv_heads, total_q, budget = selected.shape
    batch = len(cu_seqlens_q) - 1
    spare = 2 if tokens > 1 else 0  # tiles of one token lie at any position
    num_tiles = total_q // tokens + spare * batch if total_q else 0
    num_pieces = num_blocks(max_seqlen_k, piece)
    capacity = min(num_pieces, tokens * budget * (block_size // piece)) + 1
    device = selected.device
    tiles = torch.empty(num_tiles, FIELDS, dtype=torch.int32, device=device)
    counts = torch.empty(kv_heads, num_tiles, dtype=torch.int32, device=device)
    pieces, members = (
        torch.empty(kv_heads, num_tiles, capacity, dtype=torch.int32, device=device)
        for _ in range(2)
    )
    window = max(1, min(num_pieces, WINDOW))
    launch(
        Kernel(
            "union.cu",
            "unite",
            (("TOKENS", tokens), ("BLOCK", block_size), ("PIECE", piece), ("SPARE", spare)),
        ),
        (num_tiles, kv_heads, 1),
        THREADS,
        4 * window,
        selected,
        selected,
        cu_seqlens_q,
        cu_seqlens_k,
        tiles,
        counts,
        pieces,
        members,
        *(np.int64(stride) for stride in selected.stride()),
        batch,
        num_tiles,
        num_pieces,
        window,
        capacity,
        budget,
        dense_len,
    )
    return Union(tiles, counts, pieces, members, tokens, piece)
