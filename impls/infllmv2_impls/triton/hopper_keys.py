"""The gradients of keys and values for Hopper GPUs: one program per piece and run of its readers.

The program keeps the keys and values of its piece, and the loader brings the queries and gradients
of four readers at a time (with 16 heads per kv head): 64 rows, for the two groups of warps in turn.
Each group sums on its own, in registers; in the end the second hands its sums to the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attend_backward import sum_items
from .attend_forward import LOG2_E
from .hopper import ROWS, boxes, head_boxes
from .readers import PIECE_FIELDS, Readers
from .shapes import Shape

HALF = gl.constexpr(64)
"""Columns of a box: 128 bytes, so that the rows of a reader stay together in shared memory."""
STAGES = {64: 8, 128: 6}
"""Even, so that a stage always serves the same group, which so sees every round of it."""


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
    """Return the gradients of `k` and `v`; `grad_out` is contiguous."""
    grad_k, grad_v = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    parts = readers.new_parts(shape.piece, shape.head_dim)
    _key_gradients[(readers.num_items,)](
        boxes(k, shape.piece, 64),
        boxes(v, shape.piece, 64),
        head_boxes(q.contiguous(), shape.group, 64),
        head_boxes(grad_out, shape.group, 64),
        lse2,
        delta,
        grad_k,
        grad_v,
        parts,
        readers.records,
        readers.starts,
        readers.items,
        readers.rows,
        shape.kv_heads * readers.num_pieces,
        readers.num_pieces,
        readers.item_readers,
        shape.scale,
        shape.scale * LOG2_E,
        shape.kv_heads,
        GROUP=shape.group,
        D=shape.head_dim,
        PIECE=shape.piece,
        FIELDS=PIECE_FIELDS,
        STAGES=STAGES[shape.head_dim],
        num_warps=4,
    )
    sum_items(parts, grad_k, grad_v, readers, shape)
    return grad_k, grad_v


@gluon.jit
def _find_item(item, items, pairs):
    """Return the piece, of any head, that an item belongs to, or `pairs` if there is none."""
    low = 0
    high = pairs
    while low < high:
        middle = (low + high) // 2
        if gl.load(items + middle + 1) <= item:
            low = middle + 1
        else:
            high = middle
    return low


@gluon.jit
def _load_readers(
    k_boxes, v_boxes, q_boxes, grad_boxes, rows, first, dense, low, high, key_row, kv_head, heads,
    piece, q_ring, grad_ring, loaded, full, empty,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the piece, then queries and gradients of its readers, as stages become free."""
    TOKENS: gl.constexpr = ROWS // GROUP
    HALVES: gl.constexpr = D // HALF
    if low < high:
        mbarrier.expect(loaded, 2 * HALVES * k_boxes.block_type.nbytes)
        for half in gl.static_range(HALVES):
            place = [key_row, kv_head * D + half * HALF]
            tma.async_copy_global_to_shared(
                k_boxes, place, loaded, piece.index(half)
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_boxes, place, loaded, piece.index(HALVES + half)
            )  # fmt: skip
    at = low
    chunk = 0
    while at < high:
        stage = chunk % STAGES
        filled = full.index(stage)
        mbarrier.wait(empty.index(stage), ((chunk // STAGES) & 1) ^ 1)
        mbarrier.expect(filled, 2 * TOKENS * HALVES * q_boxes.block_type.nbytes)
        for token in gl.static_range(TOKENS):
            reader = gl.minimum(at + token, high - 1)  # the last one again, with weight 0
            row = gl.load(rows + reader, mask=dense == 0, other=0)
            row = gl.where(dense != 0, first + reader, row) * heads + kv_head * GROUP
            for half in gl.static_range(HALVES):
                place = (stage * HALVES + half) * TOKENS + token
                column = half * HALF
                tma.async_copy_global_to_shared(
                    q_boxes, [row, column], filled, q_ring.index(place)
                )  # fmt: skip
                tma.async_copy_global_to_shared(
                    grad_boxes, [row, column], filled, grad_ring.index(place)
                )
        at += TOKENS
        chunk += 1


@gluon.jit
def _reader_rows(rows, first, dense, at, high, GROUP: gl.constexpr, layout: gl.constexpr):
    """Return the row of `q` of the reader of each of 64 rows, from reader `at` on."""
    reader = at + gl.arange(0, ROWS, layout) // GROUP
    row = gl.load(rows + reader, mask=(reader < high) & (dense == 0), other=0)
    return gl.where(dense != 0, first + reader, row)


@gluon.jit
def _statistics(
    lse2, delta, row, at, high, heads, head, GROUP: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Return LSE and delta of the rows of readers from `at` on, infinity and 0 behind the last."""
    index = gl.arange(0, ROWS, layout)
    asks = at + index // GROUP < high
    where = row.to(gl.int64) * heads + head + index % GROUP
    sums = gl.load(lse2 + where, mask=asks, other=float("inf"))
    return sums, gl.load(delta + where, mask=asks, other=0.0)


@gluon.jit
def _product(piece, at, ring, stage, zero, HALVES: gl.constexpr):
    """Start the product of keys or values with a chunk of rows, over all columns."""
    x = ring.index(stage * HALVES).permute((1, 0))
    result = warpgroup_mma(piece.index(at), x, zero, use_acc=False, is_async=True)
    if HALVES == 2:
        x = ring.index(stage * HALVES + 1).permute((1, 0))
        result = warpgroup_mma(piece.index(at + 1), x, result, is_async=True)
    return result


@gluon.jit
def _hand_over(x, desk, ready, free, turn: gl.constexpr, INDEX: gl.constexpr):
    """Let the second group put its sums on the desk, and the first add them to its own."""
    if INDEX == 1:
        mbarrier.wait(free, turn & 1)
        desk.store(x)
        mbarrier.arrive(ready, count=1)
    else:
        mbarrier.wait(ready, turn & 1)
        x = x + desk.load(x.type.layout)
        mbarrier.arrive(free, count=1)
    return x


@gluon.jit
def _write(
    x, grad, parts, which, half, key_row, num_keys, kv_head, kv_heads, alone, item,
    D: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Write half of the columns of a gradient, or of an item's part of it."""
    layout: gl.constexpr = x.type.layout
    key = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    dim = (half * HALF + gl.arange(0, HALF, gl.SliceLayout(0, layout)))[None, :]
    if alone:
        at = ((key_row + key).to(gl.int64) * kv_heads + kv_head)[:, None] * D + dim
        gl.store(grad + at, x.to(grad.dtype.element_ty), mask=(key < num_keys)[:, None])
    else:
        at = ((item.to(gl.int64) * 2 + which) * PIECE + key[:, None]) * D + dim
        gl.store(parts + at, x)


@gluon.jit
def _sum_readers(
    lse2, delta, grad_k, grad_v, parts, rows, first, dense, low, high, origin, start, key_row,
    num_keys, kv_head, kv_heads, alone, item, scale, scale2,
    piece, q_ring, grad_ring, desk, loaded, full, empty, ready, free,
    INDEX: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Sum over every second chunk of readers, as group `INDEX` of the program's warps."""
    TOKENS: gl.constexpr = ROWS // GROUP
    HALVES: gl.constexpr = D // HALF
    dtype: gl.constexpr = piece.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    column: gl.constexpr = gl.SliceLayout(0, layout)
    thin: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    heads = kv_heads * GROUP
    head = kv_head * GROUP
    zero = gl.zeros([PIECE, ROWS], gl.float32, layout)
    k0 = gl.zeros([PIECE, HALF], gl.float32, layout)
    k1 = gl.zeros([PIECE, HALF], gl.float32, layout)
    v0 = gl.zeros([PIECE, HALF], gl.float32, layout)
    v1 = gl.zeros([PIECE, HALF], gl.float32, layout)
    STEP: gl.constexpr = 2 * TOKENS
    at = low + INDEX * TOKENS
    chunk = gl.to_tensor(INDEX)
    # What the next chunk needs is loaded one chunk ahead, and its rows two.
    row = _reader_rows(rows, first, dense, at, high, GROUP, thin)
    sums, shift = _statistics(lse2, delta, row, at, high, heads, head, GROUP, thin)
    next_row = _reader_rows(rows, first, dense, at + STEP, high, GROUP, thin)
    stage = chunk % STAGES
    if at < high:
        mbarrier.wait(loaded, 0)
        mbarrier.wait(full.index(stage), (chunk // STAGES) & 1)
        logits = _product(piece, 0, q_ring, stage, zero, HALVES)
        logits = warpgroup_mma_wait(0, deps=[logits])
        while at < high:
            products = _product(piece, HALVES, grad_ring, stage, zero, HALVES)
            sums_now = gl.convert_layout(sums, column)[None, :]
            weights = gl.exp2(logits * scale2 - sums_now)
            if at < PIECE:  # only the first readers may lie inside the piece
                key = start + gl.arange(0, PIECE, gl.SliceLayout(1, layout))
                position = gl.convert_layout(row, column) - origin
                weights = gl.where(key[:, None] <= position[None, :], weights, 0.0)
            rounded = gl.convert_layout(weights.to(dtype), operand)
            shift_now = gl.convert_layout(shift, column)[None, :]
            v0 = warpgroup_mma(rounded, grad_ring.index(stage * HALVES), v0, is_async=True)
            if HALVES == 2:
                v1 = warpgroup_mma(rounded, grad_ring.index(stage * HALVES + 1), v1, is_async=True)
            products = warpgroup_mma_wait(HALVES, deps=[products])
            slope = gl.convert_layout((weights * (products - shift_now)).to(dtype), operand)
            k0 = warpgroup_mma(slope, q_ring.index(stage * HALVES), k0, is_async=True)
            if HALVES == 2:
                k1 = warpgroup_mma(slope, q_ring.index(stage * HALVES + 1), k1, is_async=True)
            row = next_row
            sums, shift = _statistics(
                lse2, delta, row, at + STEP, high, heads, head, GROUP, thin
            )  # fmt: skip
            next_row = _reader_rows(rows, first, dense, at + 2 * STEP, high, GROUP, thin)
            at += STEP
            chunk += gl.where(at < high, 2, 0)
            following = chunk % STAGES
            mbarrier.wait(full.index(following), (chunk // STAGES) & 1)
            logits = _product(piece, 0, q_ring, following, zero, HALVES)
            logits, k0, k1, v0, v1, rounded, slope = warpgroup_mma_wait(
                0, deps=[logits, k0, k1, v0, v1, rounded, slope]
            )
            mbarrier.arrive(empty.index(stage), count=1)
            stage = following

    if INDEX == 0:
        mbarrier.arrive(free, count=1)  # the desk is where keys and values were
    k0 = _hand_over(k0, desk, ready, free, 0, INDEX)
    v0 = _hand_over(v0, desk, ready, free, 1, INDEX)
    if HALVES == 2:
        k1 = _hand_over(k1, desk, ready, free, 2, INDEX)
        v1 = _hand_over(v1, desk, ready, free, 3, INDEX)
    if INDEX == 0:
        _write(
            k0 * scale, grad_k, parts, 0, 0, key_row, num_keys, kv_head, kv_heads, alone, item,
            D, PIECE,
        )  # fmt: skip
        _write(v0, grad_v, parts, 1, 0, key_row, num_keys, kv_head, kv_heads, alone, item, D, PIECE)
        if HALVES == 2:
            _write(
                k1 * scale, grad_k, parts, 0, 1, key_row, num_keys, kv_head, kv_heads, alone, item,
                D, PIECE,
            )  # fmt: skip
            _write(
                v1, grad_v, parts, 1, 1, key_row, num_keys, kv_head, kv_heads, alone, item,
                D, PIECE,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["pairs", "num_pieces", "item_readers", "kv_heads"])
def _key_gradients(
    k_boxes, v_boxes, q_boxes, grad_boxes, lse2, delta, grad_k, grad_v, parts,
    records, starts, items, rows, pairs, num_pieces, item_readers, scale, scale2, kv_heads,
    GROUP: gl.constexpr, D: gl.constexpr, PIECE: gl.constexpr, FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    item = gl.program_id(0)
    pair = _find_item(item, items, pairs)
    if pair < pairs:
        kv_head = pair // num_pieces
        record = records + (pair % num_pieces) * FIELDS
        key_row = gl.load(record + 0)
        num_keys = gl.load(record + 1)
        start = gl.load(record + 2)
        origin = gl.load(record + 3)
        first = origin + gl.load(record + 4)
        dense = gl.load(record + 6)
        begin = gl.load(starts + pair)
        count = gl.load(starts + pair + 1) - begin
        count = gl.where(dense != 0, gl.load(record + 5), count)
        rows += begin
        first_item = gl.load(items + pair)
        alone = gl.load(items + pair + 1) - first_item == 1
        low = (item - first_item) * item_readers
        high = gl.where(alone, count, gl.minimum(low + item_readers, count))
        heads = kv_heads * GROUP
        TOKENS: gl.constexpr = ROWS // GROUP
        HALVES: gl.constexpr = D // HALF
        CHUNKS: gl.constexpr = STAGES * HALVES
        dtype: gl.constexpr = k_boxes.dtype
        piece = gl.allocate_shared_memory(dtype, [2 * HALVES, PIECE, HALF], k_boxes.layout)
        # The loader writes reader by reader what the groups read as 64 rows.
        q_ring = gl.allocate_shared_memory(dtype, [CHUNKS * TOKENS, GROUP, HALF], q_boxes.layout)
        grad_ring = gl.allocate_shared_memory(dtype, [CHUNKS * TOKENS, GROUP, HALF], q_boxes.layout)
        q_rows = q_ring._reinterpret(dtype, [CHUNKS, ROWS, HALF], k_boxes.layout)
        grad_rows = grad_ring._reinterpret(dtype, [CHUNKS, ROWS, HALF], k_boxes.layout)
        desk_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
        desk = piece._reinterpret(gl.float32, [HALVES, PIECE, HALF], desk_layout).index(0)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        others = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(full.index(stage), count=1)
            mbarrier.init(empty.index(stage), count=1)
        for i in gl.static_range(3):
            mbarrier.init(others.index(i), count=1)
        loaded = others.index(0)
        ready = others.index(1)
        free = others.index(2)
        gl.warp_specialize(
            [
                (_sum_readers, (
                    lse2, delta, grad_k, grad_v, parts, rows, first, dense, low, high, origin,
                    start, key_row, num_keys, kv_head, kv_heads, alone, item, scale, scale2,
                    piece, q_rows, grad_rows, desk, loaded, full, empty, ready, free,
                    0, GROUP, D, PIECE, STAGES,
                )),
                (_sum_readers, (
                    lse2, delta, grad_k, grad_v, parts, rows, first, dense, low, high, origin,
                    start, key_row, num_keys, kv_head, kv_heads, alone, item, scale, scale2,
                    piece, q_rows, grad_rows, desk, loaded, full, empty, ready, free,
                    1, GROUP, D, PIECE, STAGES,
                )),
                (_load_readers, (
                    k_boxes, v_boxes, q_boxes, grad_boxes, rows, first, dense, low, high, key_row,
                    kv_head, heads, piece, q_ring, grad_ring, loaded, full, empty,
                    GROUP, D, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
