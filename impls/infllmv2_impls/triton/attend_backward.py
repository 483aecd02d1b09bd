"""The backward of `attend` in plain Triton: gradients of queries by tile, of keys by piece.

With `P = exp(logit - lse)`, `dP = dO . v` and `delta = dO . out - dlse`: `dV = P dO`,
`dlogit = P (dP - delta)`, `dQ = scale dlogit K` and `dK = scale dlogit Q`. Two kernels compute P
from the LSE, each for itself: tiles like those of the forward give the gradients of queries, and
the readers of a piece (`readers.py`) those of its keys and values. Nothing is added atomically, so
the bits never differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend_forward import LOG2_E, load_piece, tile_rows
from .readers import PIECE_FIELDS, Readers
from .shapes import Shape
from .union import Union

ROWS = 64
"""Rows of queries whose statistics are computed at once."""


def row_statistics(
    out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the LSE in base 2, infinity in rows that attended nothing, and `delta`, 0 in these.

    Both are float32 `[total_q, HQ]`; with these values such rows have weights 0 and no gradient.
    """
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    rows = lse.numel()
    if rows:
        _row_statistics[(triton.cdiv(rows, ROWS),)](
            out, lse, grad_out, grad_lse, lse2, delta, rows,
            D=out.shape[2], D_PAD=triton.next_power_of_2(out.shape[2]), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return lse2, delta


def query_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    union: Union,
    shape: Shape,
) -> Tensor:
    """Return the gradient of `q`."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if union.num_tiles:
        _query_gradients[(union.num_tiles, shape.kv_heads)](
            q, k, v, grad_out, lse2, delta, grad_q,
            union.tiles, union.counts, union.pieces, union.members,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2],
            union.num_tiles, union.capacity, shape.scale,
            **shape.tile_sizes(union), LOG2_E=LOG2_E, num_warps=4, num_stages=2,
        )  # fmt: skip
    return grad_q


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse2: Tensor,
    delta: Tensor,
    readers: Readers,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `k` and `v`."""
    grad_k, grad_v = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    parts = readers.new_parts(shape.piece, shape.head_dim)
    pairs = shape.kv_heads * readers.num_pieces
    if pairs:
        _key_gradients[(readers.num_items,)](
            q, k, v, grad_out, lse2, delta, grad_k, grad_v, parts,
            readers.records, readers.starts, readers.items, readers.rows,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad_out.stride()[:2],
            pairs, readers.num_pieces, readers.item_readers, shape.scale, shape.kv_heads,
            HEADS=shape.padded_group, TOKENS=shape.readers, FIELDS=PIECE_FIELDS, LOG2_E=LOG2_E,
            **shape.sizes(), num_warps=8, num_stages=2,
        )  # fmt: skip
        sum_items(parts, grad_k, grad_v, readers, shape)
    return grad_k, grad_v


def sum_items(
    parts: Tensor, grad_k: Tensor, grad_v: Tensor, readers: Readers, shape: Shape
) -> None:
    """Sum the parts of pieces that more than one item worked on, and write the gradients."""
    _sum_items[(shape.kv_heads * readers.num_pieces,)](
        parts, grad_k, grad_v, readers.records, readers.items, shape.kv_heads, readers.num_pieces,
        FIELDS=PIECE_FIELDS, D=shape.head_dim, D_PAD=shape.padded_dim, PIECE=shape.piece,
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _row_statistics(
    out, lse, grad_out, grad_lse, lse2, delta, rows,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D_PAD)
    within = row < rows
    at = row.to(tl.int64)[:, None] * D + dim[None, :]
    inside = within[:, None] & (dim < D)[None, :]
    result = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    sums = tl.load(lse + row, mask=within, other=float("-inf"))
    shift = tl.sum(result * grad, 1) - tl.load(grad_lse + row, mask=within, other=0.0)
    empty = sums == float("-inf")
    tl.store(lse2 + row, tl.where(empty, float("inf"), sums * 1.4426950408889634), mask=within)
    tl.store(delta + row, tl.where(empty, 0.0, shift), mask=within)


@triton.jit
def _tile_step(
    acc, queries, grads, lse2, delta, member, keys, values, unseen, scale,
    PRECISION: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add one piece's part to the gradient of a tile's rows, without the scale."""
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    weights = tl.exp2(logits - tl.where(member, lse2, float("inf"))[:, None])
    if LAST:
        weights = tl.where(unseen, 0.0, weights)
    products = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    slope = (weights * (products - delta[:, None])).to(keys.dtype)
    return tl.dot(slope, keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tiles", "capacity"])
def _query_gradients(
    q, k, v, grad_out, lse2, delta, grad_q, tiles, counts, pieces, members,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    grad_row_stride, grad_head_stride, num_tiles, capacity, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PIECE: tl.constexpr, FIELDS: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
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
    heads = tl.num_programs(1) * GROUP
    dim = tl.arange(0, D_PAD)
    row = row.to(tl.int64)
    at = row * q_row_stride + head.to(tl.int64) * q_head_stride
    inside = asks[:, None] & (dim < D)[None, :]
    queries = tl.load(q + at[:, None] + dim[None, :], mask=inside, other=0.0)
    at = row * grad_row_stride + head.to(tl.int64) * grad_head_stride
    grads = tl.load(grad_out + at[:, None] + dim[None, :], mask=inside, other=0.0)
    sums = tl.load(lse2 + row * heads + head, mask=asks, other=float("inf"))
    shift = tl.load(delta + row * heads + head, mask=asks, other=0.0)
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    acc = tl.zeros([TOKENS * HEADS, D_PAD], tl.float32)
    if count > 0:  # the latest piece, as in the forward
        start = tl.load(pieces, mask=~dense, other=count - 1) * PIECE
        bits = tl.load(members, mask=~dense, other=-1)
        keys = load_piece(k, key_row, start, k_row_stride, num_keys, D, D_PAD, PIECE, True)
        values = load_piece(v, key_row, start, v_row_stride, num_keys, D, D_PAD, PIECE, True)
        unseen = start + tl.arange(0, PIECE)[None, :] > position[:, None]
        acc = _tile_step(
            acc, queries, grads, sums, shift, ((bits >> token) & 1) != 0, keys, values, unseen,
            scale * LOG2_E, PRECISION, True,
        )  # fmt: skip
    for i in range(1, count):
        start = tl.load(pieces + i, mask=~dense, other=count - 1 - i) * PIECE
        bits = tl.load(members + i, mask=~dense, other=-1)
        keys = load_piece(k, key_row, start, k_row_stride, num_keys, D, D_PAD, PIECE, False)
        values = load_piece(v, key_row, start, v_row_stride, num_keys, D, D_PAD, PIECE, False)
        acc = _tile_step(
            acc, queries, grads, sums, shift, ((bits >> token) & 1) != 0, keys, values, 0,
            scale * LOG2_E, PRECISION, False,
        )  # fmt: skip
    at = (row * heads + head) * D
    acc = (acc * scale).to(grad_q.dtype.element_ty)
    tl.store(grad_q + at[:, None] + dim[None, :], acc, mask=inside)


@triton.jit
def find_item(item, items, pairs):
    """Return the piece, of any head, that an item belongs to, or `pairs` if there is none."""
    low = 0
    high = pairs
    while low < high:
        middle = (low + high) // 2
        if tl.load(items + middle + 1) <= item:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def _piece_step(
    grad_k, grad_v, keys, values, q, grad_out, lse2, delta, rows, first, at, stop, dense,
    origin, start, kv_head, heads, scale,
    q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PIECE: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add the part of readers `at .. at + TOKENS` to a piece's gradients, that of keys unscaled."""
    index = tl.arange(0, TOKENS * HEADS)
    reader = at + index // HEADS
    head = index % HEADS
    asks = (reader < stop) & (head < GROUP)
    head += kv_head * GROUP
    row = tl.load(rows + reader, mask=(reader < stop) & ~dense, other=0)
    row = tl.where(dense, first + reader, row)
    dim = tl.arange(0, D_PAD)
    inside = asks[:, None] & (dim < D)[None, :]
    wide = row.to(tl.int64)
    where = wide * q_row_stride + head.to(tl.int64) * q_head_stride
    queries = tl.load(q + where[:, None] + dim[None, :], mask=inside, other=0.0)
    where = wide * grad_row_stride + head.to(tl.int64) * grad_head_stride
    grads = tl.load(grad_out + where[:, None] + dim[None, :], mask=inside, other=0.0)
    sums = tl.load(lse2 + wide * heads + head, mask=asks, other=float("inf"))
    shift = tl.load(delta + wide * heads + head, mask=asks, other=0.0)
    logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    weights = tl.exp2(logits - sums[None, :])  # [PIECE, TOKENS * HEADS]
    if LAST:
        unseen = (start + tl.arange(0, PIECE))[:, None] > (row - origin)[None, :]
        weights = tl.where(unseen, 0.0, weights)
    grad_v = tl.dot(weights.to(grads.dtype), grads, grad_v, input_precision=PRECISION)
    products = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    slope = (weights * (products - shift[None, :])).to(queries.dtype)
    grad_k = tl.dot(slope, queries, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["pairs", "num_pieces", "item_readers"])
def _key_gradients(
    q, k, v, grad_out, lse2, delta, grad_k, grad_v, parts, records, starts, items, rows,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    grad_row_stride, grad_head_stride, pairs, num_pieces, item_readers, scale, kv_heads,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, FIELDS: tl.constexpr,
    PRECISION: tl.constexpr, LOG2_E: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    pair = find_item(item, items, pairs)
    if pair >= pairs:
        return
    kv_head = pair // num_pieces
    record = records + (pair % num_pieces) * FIELDS
    key_row = tl.load(record + 0)
    num_keys = tl.load(record + 1)
    start = tl.load(record + 2)
    origin = tl.load(record + 3)
    first = origin + tl.load(record + 4)
    dense = tl.load(record + 6) != 0
    begin = tl.load(starts + pair)
    count = tl.where(dense, tl.load(record + 5), tl.load(starts + pair + 1) - begin)
    part = item - tl.load(items + pair)
    alone = tl.load(items + pair + 1) - tl.load(items + pair) == 1
    low = part * item_readers
    high = tl.where(alone, count, tl.minimum(low + item_readers, count))
    rows += begin
    keys = load_piece(
        k + kv_head.to(tl.int64) * k_head_stride,
        key_row,
        0,
        k_row_stride,
        num_keys,
        D,
        D_PAD,
        PIECE,
        True,
    )
    values = load_piece(
        v + kv_head.to(tl.int64) * v_head_stride,
        key_row,
        0,
        v_row_stride,
        num_keys,
        D,
        D_PAD,
        PIECE,
        True,
    )
    acc_k = tl.zeros([PIECE, D_PAD], tl.float32)
    acc_v = tl.zeros([PIECE, D_PAD], tl.float32)
    heads = kv_heads * GROUP
    middle = tl.minimum(low + tl.cdiv(tl.maximum(PIECE - low, 0), TOKENS) * TOKENS, high)
    for at in range(low, middle, TOKENS):  # only the first readers may lie inside the piece
        acc_k, acc_v = _piece_step(
            acc_k, acc_v, keys, values, q, grad_out, lse2, delta, rows, first, at, high, dense,
            origin, start, kv_head, heads, scale * LOG2_E,
            q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            GROUP, HEADS, TOKENS, D, D_PAD, PIECE, PRECISION, True,
        )  # fmt: skip
    for at in range(middle, high, TOKENS):
        acc_k, acc_v = _piece_step(
            acc_k, acc_v, keys, values, q, grad_out, lse2, delta, rows, first, at, high, dense,
            origin, start, kv_head, heads, scale * LOG2_E,
            q_row_stride, q_head_stride, grad_row_stride, grad_head_stride,
            GROUP, HEADS, TOKENS, D, D_PAD, PIECE, PRECISION, False,
        )  # fmt: skip
    acc_k *= scale
    key = tl.arange(0, PIECE)
    dim = tl.arange(0, D_PAD)
    if alone:
        place = ((key_row + key).to(tl.int64) * kv_heads + kv_head)[:, None] * D + dim[None, :]
        inside = (key < num_keys)[:, None] & (dim < D)[None, :]
        tl.store(grad_k + place, acc_k.to(grad_k.dtype.element_ty), mask=inside)
        tl.store(grad_v + place, acc_v.to(grad_v.dtype.element_ty), mask=inside)
    else:
        place = (item.to(tl.int64) * 2 * PIECE + key[:, None]) * D + dim[None, :]
        tl.store(parts + place, acc_k, mask=(dim < D)[None, :])
        tl.store(parts + place + PIECE * D, acc_v, mask=(dim < D)[None, :])


@triton.jit(do_not_specialize=["num_pieces"])
def _sum_items(
    parts, grad_k, grad_v, records, items, kv_heads, num_pieces, FIELDS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Sum the parts of pieces that more than one item worked on."""
    pair = tl.program_id(0)
    first = tl.load(items + pair)
    stop = tl.load(items + pair + 1)
    if stop - first > 1:
        key = tl.arange(0, PIECE)
        dim = tl.arange(0, D_PAD)
        acc_k = tl.zeros([PIECE, D_PAD], tl.float32)
        acc_v = tl.zeros([PIECE, D_PAD], tl.float32)
        for item in range(first, stop):
            at = (tl.cast(item, tl.int64) * 2 * PIECE + key[:, None]) * D + dim[None, :]
            acc_k += tl.load(parts + at, mask=(dim < D)[None, :], other=0.0)
            acc_v += tl.load(parts + at + PIECE * D, mask=(dim < D)[None, :], other=0.0)
        record = records + (pair % num_pieces) * FIELDS
        key_row = tl.load(record + 0)
        num_keys = tl.load(record + 1)
        row = (key_row + key).to(tl.int64) * kv_heads + pair // num_pieces
        at = row[:, None] * D + dim[None, :]
        inside = (key < num_keys)[:, None] & (dim < D)[None, :]
        tl.store(grad_k + at, acc_k.to(grad_k.dtype.element_ty), mask=inside)
        tl.store(grad_v + at, acc_v.to(grad_v.dtype.element_ty), mask=inside)
