"""The forward of `attend` for Hopper GPUs: three groups of warps over one union of pieces.

A tile has 192 rows, 64 for each group: with 16 heads per kv head, four tokens. All twelve tokens
share what is loaded, but a group skips pieces that none of its own tokens attends. While a group's
weights of one piece are multiplied with the values, it takes the exponentials of the next one.
"""

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


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, union: Union, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Attend the pieces of every tile: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _attend_tile[(union.num_tiles, shape.kv_heads)](
        boxes(k, union.piece, shape.head_dim),
        boxes(v, union.piece, shape.head_dim),
        q,
        out,
        lse,
        union.tiles,
        union.counts,
        union.pieces,
        union.members,
        *q.stride()[:2],
        union.num_tiles,
        union.capacity,
        shape.scale * LOG2_E,
        GROUP=shape.group,
        D=shape.head_dim,
        PIECE=union.piece,
        FIELDS=FIELDS,
        STAGES=STAGES[shape.head_dim],
        num_warps=4,
    )
    return out, lse


@gluon.jit
def _weigh(logits, top, total, member, scale):
    """Return the weights of logits; the new maximum and sum of rows, and what is left of the old.

    Rows that are no members subtract infinity, so that their weights are exactly 0.
    """
    new_top = gl.where(member, gl.maximum(top, gl.max(logits, 1) * scale), top)
    weights = gl.exp2(logits * scale - gl.where(member, new_top, float("inf"))[:, None])
    share = gl.exp2(top - new_top)
    return weights, new_top, total * share + gl.sum(weights, 1), share


@gluon.jit
def _attend_rows(
    q, out, lse, pieces, members, count, dense, row, base, first, num_keys, kv_head,
    q_row_stride, q_head_stride, heads, scale, q_rows, k_ring, v_ring, full, empty,
    INDEX: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of a tile, as group `INDEX` of the program's warps."""
    TOKENS: gl.constexpr = ROWS // GROUP
    dtype: gl.constexpr = k_ring.dtype
    logits_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    line: gl.constexpr = gl.SliceLayout(1, logits_layout)
    acc_line: gl.constexpr = gl.SliceLayout(1, acc_layout)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SHIFT: gl.constexpr = INDEX * TOKENS
    MASK: gl.constexpr = (1 << TOKENS) - 1

    index = gl.arange(0, ROWS, gl.SliceLayout(1, rows))
    token = SHIFT + index // GROUP
    asks = (base + token >= first) & (base + token < num_keys)
    head = kv_head * GROUP + index % GROUP
    at = (row + token).to(gl.int64) * q_row_stride + head.to(gl.int64) * q_head_stride
    at = at[:, None] + gl.arange(0, D, gl.SliceLayout(0, rows))[None, :]
    queries = q_rows.index(INDEX)
    queries.store(gl.load(q + at, mask=asks[:, None], other=0.0))
    fence_async_shared()

    index = gl.arange(0, ROWS, line)
    bit = index // GROUP
    position = base + SHIFT + bit
    acc = gl.zeros([ROWS, D], gl.float32, acc_layout)
    top = gl.full([ROWS], -3.0e38, gl.float32, line)  # finite, so that differences are
    total = gl.zeros([ROWS], gl.float32, line)
    zero = gl.zeros([ROWS, PIECE], gl.float32, logits_layout)
    opens = first_open(count, dense, base + SHIFT, first, num_keys, TOKENS, PIECE)
    i, bits = next_piece(
        gl.to_tensor(0), count, members, SHIFT, MASK, dense, opens, full, empty, STAGES
    )  # fmt: skip
    if i < count:  # the latest piece may hold keys after a query, or end behind the sequence
        stage = i % STAGES
        held = i
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        keys = k_ring.index(stage).permute((1, 0))
        logits = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=[logits])
        piece = gl.load(pieces + i, mask=dense == 0, other=count - 1 - i)
        key = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, logits_layout))
        logits = gl.where(key[None, :] <= position[:, None], logits, float("-inf"))
        if piece * PIECE + PIECE > num_keys:
            erase_after(v_ring, stage, piece, num_keys, rows, PIECE)
        member = ((bits >> bit) & 1) != 0
        weights, top, total, _ = _weigh(logits, top, total, member, scale)
        weights = gl.convert_layout(weights.to(dtype), operand)
        i, bits = next_piece(
            i + 1, i + STAGES - 1, members, SHIFT, MASK, dense, opens, full, empty, STAGES
        )  # fmt: skip
        share = gl.full([ROWS], 1.0, gl.float32, acc_line)
        while i < count:
            ahead = i % STAGES
            newest = i
            mbarrier.wait(full.index(ahead), (i // STAGES) & 1)
            keys = k_ring.index(ahead).permute((1, 0))
            logits = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
            acc = acc * share[:, None]  # while the product runs
            acc = warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)
            logits = warpgroup_mma_wait(1, deps=[logits])
            member = ((bits >> bit) & 1) != 0
            new, top, total, left = _weigh(logits, top, total, member, scale)
            new = gl.convert_layout(new.to(dtype), operand)
            left = gl.convert_layout(left, acc_line)
            # The search is a loop, across which the assembler does not move the wait: it would
            # put it before the exponentials, which shall overlap with the product.
            i, bits = next_piece(
                i + 1, held + STAGES, members, SHIFT, MASK, dense, opens, full, empty, STAGES
            )  # fmt: skip
            acc, weights, new, share = warpgroup_mma_wait(0, deps=[acc, weights, new, left])
            mbarrier.arrive(empty.index(stage), count=1)
            if bits == 0:  # the search ended early: a stage less is held now
                i, bits = next_piece(
                    i, newest + STAGES - 1, members, SHIFT, MASK, dense, opens, full, empty, STAGES
                )  # fmt: skip
            weights = new
            stage = ahead
            held = newest
        acc = acc * share[:, None]
        acc = warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    some = gl.where(total > 0, total, 1.0)
    sums = gl.where(total > 0, (top + gl.log2(some)) * 0.6931471805599453, float("-inf"))
    asks = (position >= first) & (position < num_keys)
    at = (row + SHIFT + bit).to(gl.int64) * heads + kv_head * GROUP + index % GROUP
    gl.store(lse + at, sums, mask=asks)
    acc = acc / gl.convert_layout(some, acc_line)[:, None]
    index = gl.arange(0, ROWS, acc_line)
    token = SHIFT + index // GROUP
    asks = (base + token >= first) & (base + token < num_keys)
    at = ((row + token).to(gl.int64) * heads + kv_head * GROUP + index % GROUP) * D
    at = at[:, None] + gl.arange(0, D, gl.SliceLayout(0, acc_layout))[None, :]
    gl.store(out + at, acc.to(dtype), mask=asks[:, None])


@gluon.jit(do_not_specialize=["num_tiles", "capacity"])
def _attend_tile(
    k_boxes, v_boxes, q, out, lse, tiles, counts, pieces, members,
    q_row_stride, q_head_stride, num_tiles, capacity, scale,
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
    q_rows = gl.allocate_shared_memory(dtype, [3, ROWS, D], k_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    heads = gl.num_programs(1) * GROUP
    gl.warp_specialize(
        [
            (_attend_rows, (
                q, out, lse, pieces, members, count, dense, row, base, first, num_keys, kv_head,
                q_row_stride, q_head_stride, heads, scale, q_rows, k_ring, v_ring, full, empty,
                0, GROUP, D, PIECE, STAGES,
            )),
            (_attend_rows, (
                q, out, lse, pieces, members, count, dense, row, base, first, num_keys, kv_head,
                q_row_stride, q_head_stride, heads, scale, q_rows, k_ring, v_ring, full, empty,
                1, GROUP, D, PIECE, STAGES,
            )),
            (_attend_rows, (
                q, out, lse, pieces, members, count, dense, row, base, first, num_keys, kv_head,
                q_row_stride, q_head_stride, heads, scale, q_rows, k_ring, v_ring, full, empty,
                2, GROUP, D, PIECE, STAGES,
            )),
            (load_pieces, (
                k_boxes, v_boxes, pieces, count, dense, key_row, kv_head, k_ring, v_ring, full,
                empty, PIECE, D, STAGES,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
