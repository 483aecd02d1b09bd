"""What a tile of neighbouring query tokens attends together: the union of their selected blocks.

A *tile* is a run of consecutive query tokens of one sequence whose positions begin at a multiple of
the tile's size. A *piece* is a run of consecutive keys that a kernel multiplies at once: a block,
or an equal part of one. Neighbours share most of what they selected, so a kernel that walks over
the union, with one bit per token and piece, loads every piece once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllmv2_reference.geometry import num_blocks

from .grids import programs_at_once

FIELDS = 8
"""Numbers that `Union.tiles` says of a tile; see there."""

SLOTS = 64
"""Entries of the selection that are read at once, for every token of the tile."""
SCAN = 512
"""Pieces that are looked at at once."""


@dataclass(frozen=True)
class Union:
    """List the pieces of every tile, the latest first.

    Args:
        tiles: int32 `[tiles, FIELDS]`: (0) the row of `q` and (1) the position of the tile's first
            token, which may lie before the sequence; (2) the position of the sequence's first
            query; (3) how many keys the sequence has; (4) the row of its first key; (5) whether it
            attends everything; (6) the number of its first piece in the batch (`first_piece`).
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
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`.
        max_seqlen_k: at least the keys of the longest sequence.
        block_size: B, a multiple of `piece`.
        dense_len: sequences with fewer keys attend everything.
        tokens: tokens of a tile, at most 32.
        piece: keys of a piece.
    """
    kv_heads, total_q, budget = selected.shape
    batch = len(cu_seqlens_q) - 1
    num_tiles = total_q // tokens + 2 * batch if total_q else 0
    num_pieces = num_blocks(max_seqlen_k, piece)
    capacity = min(num_pieces, tokens * budget * (block_size // piece)) + 1
    device = selected.device
    tiles = torch.empty(num_tiles, FIELDS, dtype=torch.int32, device=device)
    counts = torch.empty(kv_heads, num_tiles, dtype=torch.int32, device=device)
    pieces, members = (
        torch.empty(kv_heads, num_tiles, capacity, dtype=torch.int32, device=device)
        for _ in range(2)
    )
    work = kv_heads * num_tiles
    programs = min(work, 8 * programs_at_once(device))
    if programs:
        marks = torch.zeros(programs, num_pieces, dtype=torch.int32, device=device)
        _unite[(programs,)](
            selected,
            cu_seqlens_q,
            cu_seqlens_k,
            tiles,
            counts,
            pieces,
            members,
            marks,
            *selected.stride(),
            batch,
            work,
            num_tiles,
            num_pieces,
            capacity,
            budget,
            dense_len,
            half(batch),
            BLOCK=block_size,
            PIECE=piece,
            TOKENS=tokens,
            LANES=triton.next_power_of_2(tokens),
            FIELDS=FIELDS,
            SLOTS=SLOTS,
            SCAN=SCAN,
            num_warps=4,
        )
    return Union(tiles, counts, pieces, members, tokens, piece)


def half(count: int) -> int:
    """Return the first step of a binary search among `count` things: a power of two, or 0."""
    return 1 << (count - 1).bit_length() >> 1 if count > 1 else 0


@triton.jit
def first_piece(key_row, sequence, PIECE: tl.constexpr):
    """Return the number that the first piece of a sequence has in the batch.

    Sequence i, which starts at key row r, gets the numbers from `r // PIECE + i` on. The next one
    starts late enough for all its pieces.
    """
    return key_row // PIECE + sequence


@triton.jit
def _find_tile(tile, ends, batch, step, TOKENS: tl.constexpr):
    """Return the sequence that a tile belongs to, and its number there, which may be too large.

    Sequence i, which starts at row `ends[i]`, gets the tiles from `ends[i] // TOKENS + 2 * i` on.
    The next one starts late enough: `t` queries need at most `ceil(t / TOKENS) + 1` tiles, since
    their first position may lie inside one.
    """
    low = 0  # the last sequence whose tiles start at this one or before
    while step > 0:
        middle = tl.minimum(low + step, batch - 1)
        if tl.load(ends + middle) // TOKENS + 2 * middle <= tile:
            low = middle
        step = step // 2
    return low, tile - (tl.load(ends + low) // TOKENS + 2 * low)


LENGTHS = ["batch", "work", "num_tiles", "num_pieces", "capacity", "budget", "dense_len", "step"]
"""Arguments that must not make the kernel compile anew."""


@triton.jit(do_not_specialize=LENGTHS)
def _unite(
    selected,
    ends_q,
    ends_k,
    tiles,
    counts,
    pieces,
    members,
    marks,
    head_stride,
    row_stride,
    slot_stride,
    batch,
    work,
    num_tiles,
    num_pieces,
    capacity,
    budget,
    dense_len,
    step,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
    FIELDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Mark in a table of all pieces which tokens attend each, then list what was marked.

    A program has a table of its own, `marks[program]`, which is 0 between two tiles.
    """
    marks += tl.program_id(0).to(tl.int64) * num_pieces
    token = tl.arange(0, LANES)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        head = item // num_tiles
        tile = item % num_tiles
        sequence, number = _find_tile(tile, ends_q, batch, step, TOKENS)
        start_q = tl.load(ends_q + sequence)
        start_k = tl.load(ends_k + sequence)
        num_keys = tl.load(ends_k + sequence + 1) - start_k
        first = tl.maximum(num_keys - (tl.load(ends_q + sequence + 1) - start_q), 0)
        base = (first // TOKENS + number) * TOKENS
        row = start_q + base - first
        stop = tl.minimum(num_keys, base + TOKENS)
        dense = num_keys < dense_len
        last = tl.minimum((stop - 1) // PIECE, num_pieces - 1)
        count = tl.where(stop > base, last + 1, 0)
        if head == 0:
            record = tiles + tile * FIELDS
            tl.store(record + 0, row)
            tl.store(record + 1, base)
            tl.store(record + 2, first)
            tl.store(record + 3, num_keys)
            tl.store(record + 4, start_k)
            tl.store(record + 5, dense.to(tl.int32))
            tl.store(record + 6, first_piece(start_k, sequence, PIECE))
        if (count > 0) & (not dense):
            position = base + token
            asks = (token < TOKENS) & (position >= first) & (position < num_keys)
            own = tl.minimum(position // PIECE, last)[:, None]  # the latest piece of each token
            lines = selected + head.to(tl.int64) * head_stride
            lines += (row + token).to(tl.int64) * row_stride
            bit = tl.full([LANES, SLOTS], 1, tl.int32) << token[:, None]
            for start in range(0, budget, SLOTS):
                slot = start + tl.arange(0, SLOTS)
                blocks = tl.load(
                    lines[:, None] + (slot * slot_stride)[None, :],
                    mask=asks[:, None] & (slot < budget)[None, :],
                    other=-1,
                )
                blocks = tl.where(blocks > last, -1, blocks)  # so that the product cannot overflow
                for part in tl.static_range(BLOCK // PIECE):
                    piece = blocks * (BLOCK // PIECE) + part
                    inside = (blocks >= 0) & (piece <= own)
                    tl.atomic_or(marks + piece, bit, mask=inside, sem="relaxed")
            tl.debug_barrier()  # every mark has been set
            line = capacity.to(tl.int64) * item
            count = 0
            for start in range(0, last + 1, SCAN):
                piece = last - start - tl.arange(0, SCAN)
                mark = tl.load(marks + piece, mask=piece >= 0, other=0, cache_modifier=".cg")
                used = mark != 0
                tl.store(marks + piece, 0, mask=used)
                place = line + count + tl.cumsum(used.to(tl.int32), 0) - 1
                tl.store(pieces + place, piece, mask=used)
                tl.store(members + place, mark, mask=used)
                count += tl.sum(used.to(tl.int32), 0)
            tl.store(members + line + count, -1)
            tl.debug_barrier()  # every mark has been cleared
        tl.store(counts + item, count)
