"""Who reads a piece of keys: for every piece, the query tokens that attend it.

This turns the unions of the tiles around. It is a counting sort without atomics, so that the order
of a piece's readers, and with it every sum over them, is always the same: chunks of tiles count
their readers per piece, the counts become places, and the chunks walk over their tiles once more
and write each reader to its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .union import Union, first_piece, half

PIECE_FIELDS = 8
"""Numbers that `Readers.records` says of a piece; see there."""

LANES = 128
CHUNKS = 2048
"""The most chunks: it bounds the table of their counts."""


@dataclass(frozen=True)
class Readers:
    """List the readers of every piece of the batch, in ascending order, and cut them into items.

    Args:
        records: int32 `[pieces, PIECE_FIELDS]`: (0) the row of the piece's first key; (1) how many
            keys it has, 0 if there is no such piece; (2) the position of its first key; (3) the row
            of `q` that a query at position 0 would have; (4) the position of the first query that
            may read it; (5) how many may; (6) whether they all do.
        starts: where the readers of a piece start in `rows`, int32 `[HK * pieces + 1]`.
        items: where the items of a piece start, int32 `[HK * pieces + 1]`; an item is a run of at
            most `item_readers` readers; every piece has one at least, and a piece that all
            may read just one.
        rows: rows of `q`, int32.
        item_readers: the most readers of an item.
        num_items: at least the items of all pieces.
    """

    records: Tensor
    starts: Tensor
    items: Tensor
    rows: Tensor
    item_readers: int
    num_items: int

    @property
    def num_pieces(self) -> int:
        """Return how many pieces the batch may have."""
        return self.records.shape[0]

    def new_parts(self, piece: int, head_dim: int) -> Tensor:
        """Return room for the gradients of keys and values of every item, float32."""
        shape = self.num_items, 2, piece, head_dim
        return torch.empty(shape, dtype=torch.float32, device=self.rows.device)


def list_readers(
    union: Union,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dense_len: int,
    total_q: int,
    total_k: int,
    most_pieces: int,
    item_readers: int,
) -> Readers:
    """List the readers of every piece.

    Args:
        union: what the tiles attend.
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`.
        dense_len: sequences with fewer keys are read by everyone.
        total_q: rows of `q`.
        total_k: rows of `k`.
        most_pieces: the most pieces that a query attends, in sequences of `dense_len` keys or more.
        item_readers: the most readers of an item.
    """
    device, batch, kv_heads = cu_seqlens_k.device, len(cu_seqlens_k) - 1, union.counts.shape[0]
    num_pieces = total_k // union.piece + batch
    chunk_tiles = max(64 // union.tokens, triton.cdiv(union.num_tiles, CHUNKS))
    chunks = triton.cdiv(union.num_tiles, chunk_tiles)
    pairs = kv_heads * num_pieces
    num_items = pairs + kv_heads * total_q * most_pieces // item_readers

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    records, starts, items = new(num_pieces, PIECE_FIELDS), new(pairs + 1), new(pairs + 1)
    rows = new(kv_heads * total_q * most_pieces)
    places = torch.zeros(kv_heads, chunks, num_pieces, dtype=torch.int32, device=device)
    totals = new(pairs)
    sizes = {"TOKENS": union.tokens, "LANES": LANES, "FIELDS": union.tiles.shape[1]}
    lists = union.tiles, union.counts, union.pieces, union.members
    numbers = union.num_tiles, union.capacity, num_pieces, chunks, chunk_tiles
    if chunks:
        walk = _walk[(chunks, kv_heads)]
        walk(*lists, places, starts, rows, *numbers, **sizes, WRITE=False, num_warps=4)
    if pairs:
        grid = (triton.cdiv(num_pieces, 32), kv_heads)
        _sum_chunks[grid](places, totals, chunks, num_pieces, PIECES=32, CHUNKS=64, num_warps=4)
        _describe[(triton.cdiv(num_pieces, 128),)](
            cu_seqlens_q, cu_seqlens_k, records, batch, num_pieces, dense_len, half(batch),
            PIECE=union.piece, FIELDS=PIECE_FIELDS, LANES=128, num_warps=4,
        )  # fmt: skip
    _sum_pieces[(1,)](
        totals, starts, items, pairs, item_readers, LANES=2048, num_warps=8
    )  # fmt: skip
    if chunks:
        walk(*lists, places, starts, rows, *numbers, **sizes, WRITE=True, num_warps=4)
    return Readers(records, starts, items, rows, item_readers, num_items)


@triton.jit(do_not_specialize=["num_tiles", "capacity", "num_pieces", "chunks", "chunk_tiles"])
def _walk(
    tiles, counts, pieces, members, places, starts, rows,
    num_tiles, capacity, num_pieces, chunks, chunk_tiles,
    TOKENS: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Count the readers of every piece in a chunk of tiles; or write them from their places on.

    `places` `[HK, chunks, pieces]` holds a number for every piece, which each reader raises by one:
    how many there are, or, starting with those of earlier chunks, where to write the next one.
    """
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    places += (chunks.to(tl.int64) * kv_head + chunk) * num_pieces
    starts += kv_head * num_pieces
    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, num_tiles)):
        record = tiles + tile * FIELDS
        row = tl.load(record)
        dense = tl.load(record + 5)
        origin = tl.load(record + 6)
        item = kv_head * num_tiles + tile
        count = tl.where(dense != 0, 0, tl.load(counts + item))
        line = capacity.to(tl.int64) * item
        for start in range(0, count, LANES):
            entry = start + tl.arange(0, LANES)
            within = entry < count
            piece = origin + tl.load(pieces + line + entry, mask=within, other=0)
            bits = tl.load(members + line + entry, mask=within, other=0)
            place = tl.load(places + piece, mask=within, other=0)
            first = tl.load(starts + piece, mask=within, other=0) if WRITE else place
            for token in tl.static_range(TOKENS):
                reads = ((bits >> token) & 1) != 0
                if WRITE:
                    tl.store(rows + first.to(tl.int64) + place, row + token, mask=reads)
                place += reads.to(tl.int32)
            tl.store(places + piece, place, mask=within)
        tl.debug_barrier()  # the next tile meets some of these pieces again


@triton.jit(do_not_specialize=["chunks", "num_pieces"])
def _sum_chunks(
    places, totals, chunks, num_pieces, PIECES: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Replace the counts of chunks by the sums over those before, and store the sums over all."""
    kv_head = tl.program_id(1)
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    places += chunks.to(tl.int64) * kv_head * num_pieces
    before = tl.zeros([PIECES], tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        within = (chunk < chunks)[:, None] & (piece < num_pieces)[None, :]
        at = places + chunk.to(tl.int64)[:, None] * num_pieces + piece[None, :]
        count = tl.load(at, mask=within, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, 0) - count, mask=within)
        before += tl.sum(count, 0)
    tl.store(totals + kv_head * num_pieces + piece, before, mask=piece < num_pieces)


@triton.jit(do_not_specialize=["batch", "num_pieces", "dense_len", "step"])
def _describe(
    ends_q, ends_k, records, batch, num_pieces, dense_len, step,
    PIECE: tl.constexpr, FIELDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the records of pieces."""
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    low = tl.zeros([LANES], tl.int32)  # the last sequence that starts at this piece or before
    while step > 0:
        middle = tl.minimum(low + step, batch - 1)
        low = tl.where(first_piece(tl.load(ends_k + middle), middle, PIECE) <= number, middle, low)
        step = step // 2
    start_k = tl.load(ends_k + low)
    num_keys = tl.load(ends_k + low + 1) - start_k
    start_q = tl.load(ends_q + low)
    first = tl.maximum(num_keys - (tl.load(ends_q + low + 1) - start_q), 0)
    position = (number - first_piece(start_k, low, PIECE)) * PIECE
    keys = tl.maximum(tl.minimum(num_keys - position, PIECE), 0)
    earliest = tl.maximum(first, position)
    record = records + number * FIELDS
    valid = number < num_pieces
    tl.store(record + 0, start_k + position, mask=valid)
    tl.store(record + 1, keys, mask=valid)
    tl.store(record + 2, position, mask=valid)
    tl.store(record + 3, start_q - first, mask=valid)
    tl.store(record + 4, earliest, mask=valid)
    tl.store(record + 5, tl.where(keys > 0, num_keys - earliest, 0), mask=valid)
    tl.store(record + 6, (num_keys < dense_len).to(tl.int32), mask=valid)


@triton.jit(do_not_specialize=["pairs", "item_readers"])
def _sum_pieces(totals, starts, items, pairs, item_readers, LANES: tl.constexpr):
    """Sum readers and items over the pieces before each, head by head."""
    readers_before = tl.zeros([1], tl.int32)
    items_before = tl.zeros([1], tl.int32)
    for start in range(0, pairs, LANES):
        pair = start + tl.arange(0, LANES)
        within = pair < pairs
        count = tl.load(totals + pair, mask=within, other=0)
        item = tl.maximum((count + item_readers - 1) // item_readers, 1)
        item = tl.where(within, item, 0)
        tl.store(starts + pair, readers_before + tl.cumsum(count, 0) - count, mask=within)
        tl.store(items + pair, items_before + tl.cumsum(item, 0) - item, mask=within)
        readers_before += tl.sum(count, 0)
        items_before += tl.sum(item, 0)
    one = tl.arange(0, 1)
    tl.store(starts + pairs + one, readers_before)
    tl.store(items + pairs + one, items_before)
