"""The gradient of queries for Hopper GPUs: the forward's tiles, ring and groups of warps."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attend_forward import LOG2_E
from .hopper import (
    ROWS,
    boxes,
    erase_after,
    first_open,
    load_pieces,
    next_piece,
    tile_record,
)
from .shapes import Shape
from .union import FIELDS, Union

STAGES = {64: 8, 128: 5}


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
    """Return the gradient of `q`; `grad_out` is contiguous."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _query_gradients[(union.num_tiles, shape.kv_heads)](
        boxes(k, union.piece, shape.head_dim),
        boxes(v, union.piece, shape.head_dim),
        q,
        grad_out,
        lse2,
        delta,
        grad_q,
        union.tiles,
        union.counts,
        union.pieces,
        union.members,
        *q.stride()[:2],
        union.num_tiles,
        union.capacity,
        shape.scale,
        shape.scale * LOG2_E,
        GROUP=shape.group,
        D=shape.head_dim,
        PIECE=union.piece,
        FIELDS=FIELDS,
        STAGES=STAGES[shape.head_dim],
        num_warps=4,
    )
    return grad_q


@gluon.jit
def _differentiate_rows(
    q, grad_out, lse2, delta, grad_q, pieces, members, count, dense, row, base, first, num_keys,
    kv_head, q_row_stride, q_head_stride, heads, scale, scale2,
    q_rows, grad_rows, k_ring, v_ring, full, empty,
    INDEX: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the gradient of 64 rows of a tile, as group `INDEX` of the program's warps."""
    TOKENS: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = k_ring.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    line: gl.constexpr = gl.SliceLayout(1, logits_layout)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SHIFT: gl.constexpr = INDEX * TOKENS
    MASK: gl.constexpr = (1 << TOKENS) - 1

    index = gl.arange(0, ROWS, gl.SliceLayout(1, rows))
    dim = gl.arange(0, D, gl.SliceLayout(0, rows))
    token = SHIFT + index // GROUP
    asks = (base + token >= first) & (base + token < num_keys)
    head = kv_head * GROUP + index % GROUP
    at = (row + token).to(gl.int64) * q_row_stride + head.to(gl.int64) * q_head_stride
    queries = q_rows.index(INDEX)
    queries.store(gl.load(q + at[:, None] + dim[None, :], mask=asks[:, None], other=0.0))
    at = ((row + token).to(gl.int64) * heads + head) * D
    grads = grad_rows.index(INDEX)
    grads.store(gl.load(grad_out + at[:, None] + dim[None, :], mask=asks[:, None], other=0.0))
    fence_async_shared()

    index = gl.arange(0, ROWS, line)
    bit = index // GROUP
    position = base + SHIFT + bit
    asks = (position >= first) & (position < num_keys)
    at = (row + SHIFT + bit).to(gl.int64) * heads + kv_head * GROUP + index % GROUP
    sums = gl.load(lse2 + at, mask=asks, other=float("inf"))
    shift = gl.load(delta + at, mask=asks, other=0.0)[:, None]
    acc = gl.zeros([ROWS, D], gl.float32, acc_layout)
    zero = gl.zeros([ROWS, PIECE], gl.float32, logits_layout)
    opens = first_open(count, dense, base + SHIFT, first, num_keys, TOKENS, PIECE)
    i, bits = next_piece(
        gl.to_tensor(0), count, members, SHIFT, MASK, dense, opens, full, empty, STAGES
    )  # fmt: skip
    if i < count:  # the latest piece, as in the forward
        stage = i % STAGES
        held = i
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        piece = gl.load(pieces + i, mask=dense == 0, other=count - 1 - i)
        if piece * PIECE + PIECE > num_keys:
            erase_after(k_ring, stage, piece, num_keys, rows, PIECE)
        keys = k_ring.index(stage).permute((1, 0))
        values = v_ring.index(stage).permute((1, 0))
        logits = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
        products = warpgroup_mma(grads, values, zero, use_acc=False, is_async=True)
        logits, products = warpgroup_mma_wait(0, deps=[logits, products])
        member = ((bits >> bit) & 1) != 0
        weights = gl.exp2(logits * scale2 - gl.where(member, sums, float("inf"))[:, None])
        key = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, logits_layout))
        seen = key[None, :] <= position[:, None]
        slope = gl.where(seen, weights * (products - shift), 0.0)
        slope = gl.convert_layout(slope.to(dtype), operand)
        i, bits = next_piece(
            i + 1, i + STAGES - 1, members, SHIFT, MASK, dense, opens, full, empty, STAGES
        )  # fmt: skip
        while i < count:
            ahead = i % STAGES
            newest = i
            mbarrier.wait(full.index(ahead), (i // STAGES) & 1)
            keys = k_ring.index(ahead).permute((1, 0))
            values = v_ring.index(ahead).permute((1, 0))
            logits = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
            products = warpgroup_mma(grads, values, zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(slope, k_ring.index(stage), acc, is_async=True)
            logits = warpgroup_mma_wait(2, deps=[logits])
            member = ((bits >> bit) & 1) != 0
            weights = gl.exp2(logits * scale2 - gl.where(member, sums, float("inf"))[:, None])
            products = warpgroup_mma_wait(1, deps=[products])
            new = gl.convert_layout((weights * (products - shift)).to(dtype), operand)
            i, bits = next_piece(  # keeps the wait behind the exponentials, as in the forward
                i + 1, held + STAGES, members, SHIFT, MASK, dense, opens, full, empty, STAGES
            )
            acc, slope, new = warpgroup_mma_wait(0, deps=[acc, slope, new])
            mbarrier.arrive(empty.index(stage), count=1)
            if bits == 0:  # the search ended early: a stage less is held now
                i, bits = next_piece(
                    i, newest + STAGES - 1, members, SHIFT, MASK, dense, opens, full, empty, STAGES
                )  # fmt: skip
            slope = new
            stage = ahead
            held = newest
        acc = warpgroup_mma(slope, k_ring.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    index = gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
    token = SHIFT + index // GROUP
    asks = (base + token >= first) & (base + token < num_keys)
    at = ((row + token).to(gl.int64) * heads + kv_head * GROUP + index % GROUP) * D
    at = at[:, None] + gl.arange(0, D, gl.SliceLayout(0, acc_layout))[None, :]
    gl.store(grad_q + at, (acc * scale).to(dtype), mask=asks[:, None])


@gluon.jit(do_not_specialize=["num_tiles", "capacity"])
def _query_gradients(
    k_boxes, v_boxes, q, grad_out, lse2, delta, grad_q, tiles, counts, pieces, members,
    q_row_stride, q_head_stride, num_tiles, capacity, scale, scale2,
    GROUP: gl.constexpr, D: gl.constexpr, PIECE: gl.constexpr, FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    tile = gl.program_id(0)
    kv_head = gl.program_id(1)
    row, base, first, num_keys, key_row, dense = tile_record(tile, tiles, FIELDS)
    item = kv_head * num_tiles + tile
    count = gl.load(counts + item)
    pieces += item.to(gl.int64) * capacity
    members += item.to(gl.int64) * capacity
    dtype: gl.constexpr = k_boxes.dtype
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, PIECE, D], k_boxes.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, PIECE, D], v_boxes.layout)
    q_rows = gl.allocate_shared_memory(dtype, [2, ROWS, D], k_boxes.layout)
    grad_rows = gl.allocate_shared_memory(dtype, [2, ROWS, D], k_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    heads = gl.num_programs(1) * GROUP
    gl.warp_specialize(
        [
            (_differentiate_rows, (
                q, grad_out, lse2, delta, grad_q, pieces, members, count, dense, row, base, first,
                num_keys, kv_head, q_row_stride, q_head_stride, heads, scale, scale2,
                q_rows, grad_rows, k_ring, v_ring, full, empty, 0, GROUP, D, PIECE, STAGES,
            )),
            (_differentiate_rows, (
                q, grad_out, lse2, delta, grad_q, pieces, members, count, dense, row, base, first,
                num_keys, kv_head, q_row_stride, q_head_stride, heads, scale, scale2,
                q_rows, grad_rows, k_ring, v_ring, full, empty, 1, GROUP, D, PIECE, STAGES,
            )),
            (load_pieces, (
                k_boxes, v_boxes, pieces, count, dense, key_row, kv_head, k_ring, v_ring, full,
                empty, PIECE, D, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
