"""The forward of `attend` in plain Triton: one program per tile of query tokens and kv head.

The rows of a tile are the heads of its tokens, token by token, so that one matrix product serves
all of them. It walks over the union of what they selected (`union.py`) with a running softmax in
base 2. Rows that did not select a piece subtract infinity from its logits: their weights are
exactly 0, and no element pays for it. Only the latest piece can hold keys after a query; it comes
first, and alone is masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import Shape
from .union import Union

LOWEST = tl.constexpr(-3.0e38)
"""The largest logit before any: finite, so that differences are."""
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = 1.4426950408889634
STAGES = 3
"""Pieces that are in flight."""


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, union: Union, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Attend the pieces of every tile: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if union.num_tiles:
        _attend_tile[(union.num_tiles, shape.kv_heads)](
            q,
            k,
            v,
            out,
            lse,
            union.tiles,
            union.counts,
            union.pieces,
            union.members,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            union.num_tiles,
            union.capacity,
            shape.scale * LOG2_E,
            **shape.tile_sizes(union),
            num_warps=4,
            num_stages=STAGES,
        )
    return out, lse


@triton.jit
def tile_rows(tile, tiles, FIELDS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Return the token of every row in its tile, its head, its row of `q`, its position or -1.

    Then: how many keys there are, the row of the first one, and whether all of them are attended.
    """
    record = tiles + tile * FIELDS
    row = tl.load(record + 0)
    base = tl.load(record + 1)
    first = tl.load(record + 2)
    num_keys = tl.load(record + 3)
    index = tl.arange(0, TOKENS * HEADS)
    token = index // HEADS
    position = base + token
    position = tl.where((position >= first) & (position < num_keys), position, -1)
    return (
        token,
        index % HEADS,
        row + token,
        position,
        num_keys,
        tl.load(record + 4),
        tl.load(record + 5) != 0,
    )


@triton.jit
def load_piece(
    x, key_row, start, row_stride, limit, D: tl.constexpr, D_PAD: tl.constexpr, PIECE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load the keys `start .. start + PIECE` of one head, `[PIECE, D_PAD]`; 0 from `limit` on."""
    at = start + tl.arange(0, PIECE)
    dim = tl.arange(0, D_PAD)
    where = x + ((key_row + at).to(tl.int64) * row_stride)[:, None] + dim[None, :]
    if MASKED:
        return tl.load(where, mask=(at < limit)[:, None] & (dim < D)[None, :], other=0.0)
    elif D < D_PAD:
        return tl.load(where, mask=(dim < D)[None, :], other=0.0)
    else:
        return tl.load(where)


@triton.jit
def fold(acc, top, total, logits, member, values, PRECISION: tl.constexpr):
    """Add one piece to the running softmax of rows, with logits in base 2 `[rows, PIECE]`."""
    new_top = tl.where(member, tl.maximum(top, tl.max(logits, 1)), top)
    weights = tl.exp2(logits - tl.where(member, new_top, float("inf"))[:, None])
    share = tl.exp2(top - new_top)
    total = total * share + tl.sum(weights, 1)
    weights = weights.to(values.dtype)
    acc = tl.dot(weights, values, acc * share[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_tiles", "capacity"])
def _attend_tile(
    q, k, v, out, lse, tiles, counts, pieces, members,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    out_row_stride, out_head_stride, num_tiles, capacity, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PIECE: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    token, head, row, position, num_keys, key_row, dense = tile_rows(
        tile, tiles, FIELDS, TOKENS, HEADS
    )
    item = kv_head * num_tiles + tile
    count = tl.load(counts + item)
    pieces += item.to(tl.int64) * capacity
    members += item.to(tl.int64) * capacity
    asks = (position >= 0) & (head < GROUP)
    head += kv_head * GROUP
    dim = tl.arange(0, D_PAD)
    at = row.to(tl.int64) * q_row_stride + head.to(tl.int64) * q_head_stride
    in_q = asks[:, None] & (dim < D)[None, :]
    queries = tl.load(q + at[:, None] + dim[None, :], mask=in_q, other=0.0)
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride

    acc = tl.zeros([TOKENS * HEADS, D_PAD], tl.float32)
    top = tl.full([TOKENS * HEADS], LOWEST, tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    if count > 0:  # the latest piece may hold keys after a query, or end behind the sequence
        latest = tl.load(pieces, mask=~dense, other=count - 1) * PIECE
        bits = tl.load(members, mask=~dense, other=-1)
        keys = load_piece(k, key_row, latest, k_row_stride, num_keys, D, D_PAD, PIECE, True)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        seen = latest + tl.arange(0, PIECE)[None, :] <= position[:, None]
        logits = tl.where(seen, logits, float("-inf"))
        values = load_piece(v, key_row, latest, v_row_stride, num_keys, D, D_PAD, PIECE, True)
        member = ((bits >> token) & 1) != 0
        acc, top, total = fold(acc, top, total, logits, member, values, PRECISION)
    for i in range(1, count):
        start = tl.load(pieces + i, mask=~dense, other=count - 1 - i) * PIECE
        bits = tl.load(members + i, mask=~dense, other=-1)
        keys = load_piece(k, key_row, start, k_row_stride, num_keys, D, D_PAD, PIECE, False)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        values = load_piece(v, key_row, start, v_row_stride, num_keys, D, D_PAD, PIECE, False)
        member = ((bits >> token) & 1) != 0
        acc, top, total = fold(acc, top, total, logits, member, values, PRECISION)

    some = tl.where(total > 0, total, 1.0)
    acc /= some[:, None]
    at = row.to(tl.int64) * out_row_stride + head.to(tl.int64) * out_head_stride
    tl.store(out + at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=in_q)
    sums = (top + tl.log2(some)) * LN2
    sums = tl.where(total > 0, sums, float("-inf"))
    heads = tl.num_programs(1) * GROUP
    tl.store(lse + row.to(tl.int64) * heads + head, sums, mask=asks)
