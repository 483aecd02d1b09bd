"""The forward of `attend` for few query tokens: several programs per token and kv head.

With few tokens, as in decoding, tiles would leave most of the device idle. Here each program takes
some of the blocks of one token, and a second kernel joins the parts of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attend_forward import LN2, LOG2_E, LOWEST, fold, load_piece
from .grids import programs_at_once
from .shapes import Shape
from .union import half

TOGETHER = 4
"""Tokens of a sequence that a group of warps works on in a tile; with fewer, it idles."""
LEAST_PIECES = 2
"""The fewest pieces worth a program of their own."""


def few(q: Tensor, max_seqlen_q: int, shape: Shape) -> bool:
    """Say whether there are so few tokens, as in decoding, that tiles would be mostly empty."""
    if max_seqlen_q <= TOGETHER:
        return len(q) > 0
    programs = len(q) * shape.kv_heads
    return 0 < programs <= 2 * programs_at_once(q.device) and max_seqlen_q <= 4 * TOGETHER


def attend_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dense_len: int,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """Attend the blocks of every token: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`."""
    total_q, heads, dim = q.shape
    batch, budget = len(cu_seqlens_q) - 1, selected.shape[2]
    pieces = budget * (shape.block_size // shape.piece)
    wanted = triton.cdiv(2 * programs_at_once(q.device), total_q * shape.kv_heads)
    parts = max(1, min(wanted, triton.cdiv(pieces, LEAST_PIECES)))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    sums = torch.empty(parts, total_q, heads, dim, dtype=torch.float32, device=q.device)
    tops, totals = (
        torch.empty(parts, total_q, heads, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    _attend_token[(parts, total_q, shape.kv_heads)](
        q, k, v, selected, cu_seqlens_q, cu_seqlens_k, sums, tops, totals,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *selected.stride(),
        batch, half(batch), budget, dense_len, shape.scale * LOG2_E,
        **shape.sizes(), BLOCK=shape.block_size, HEADS=max(16, shape.padded_group),
        SLOTS=triton.next_power_of_2(max(budget, 1)), num_warps=4, num_stages=3,
    )  # fmt: skip
    _join_parts[(total_q, heads)](
        sums, tops, totals, out, lse, parts, D=dim, D_PAD=shape.padded_dim, PARTS=16, num_warps=2
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["batch", "step", "budget", "dense_len"])
def _attend_token(
    q, k, v, selected, ends_q, ends_k, sums, tops, totals,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride,
    head_stride, row_stride, slot_stride, batch, step, budget, dense_len, scale,
    GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PIECE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sum over a part of the pieces of one token, with a running softmax."""
    part = tl.program_id(0)
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    parts = tl.num_programs(0)
    sequence = 0  # the last one that starts at this row or before
    while step > 0:
        middle = tl.minimum(sequence + step, batch - 1)
        if tl.load(ends_q + middle) <= row:
            sequence = middle
        step = step // 2
    key_row = tl.load(ends_k + sequence)
    num_keys = tl.load(ends_k + sequence + 1) - key_row
    position = num_keys - (tl.load(ends_q + sequence + 1) - row)
    own = position // BLOCK
    dense = num_keys < dense_len
    line = selected + kv_head.to(tl.int64) * head_stride + row.to(tl.int64) * row_stride
    slot = tl.arange(0, SLOTS)
    blocks = tl.load(line + slot * slot_stride, mask=(slot < budget) & ~dense, other=-1)
    count = tl.sum(((blocks >= 0) & (blocks <= own)).to(tl.int32), 0)
    count = tl.where(position >= 0, tl.where(dense, own + 1, count), 0) * (BLOCK // PIECE)

    head = tl.arange(0, HEADS)
    dim = tl.arange(0, D_PAD)
    inside = (head < GROUP)[:, None] & (dim < D)[None, :]
    heads = tl.num_programs(2) * GROUP
    head += kv_head * GROUP
    at = row.to(tl.int64) * q_row_stride + head.to(tl.int64) * q_head_stride
    queries = tl.load(q + at[:, None] + dim[None, :], mask=inside, other=0.0)
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride
    acc = tl.zeros([HEADS, D_PAD], tl.float32)
    top = tl.full([HEADS], LOWEST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    each = tl.cdiv(count, parts)
    for i in range(part * each, tl.minimum((part + 1) * each, count)):
        block = tl.load(line + i // (BLOCK // PIECE) * slot_stride, mask=~dense, other=-1)
        block = tl.where(dense, i // (BLOCK // PIECE), tl.minimum(tl.maximum(block, 0), own))
        start = block * BLOCK + i % (BLOCK // PIECE) * PIECE
        limit = position + 1
        keys = load_piece(k, key_row, start, k_row_stride, limit, D, D_PAD, PIECE, True)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        seen = start + tl.arange(0, PIECE)[None, :] < limit
        logits = tl.where(seen, logits, float("-inf"))
        values = load_piece(v, key_row, start, v_row_stride, limit, D, D_PAD, PIECE, True)
        acc, top, total = fold(acc, top, total, logits, start < limit, values, PRECISION)

    rows = tl.num_programs(1)
    at = (part.to(tl.int64) * rows + row) * heads + head
    tl.store(sums + (at * D)[:, None] + dim[None, :], acc, mask=inside)
    tl.store(tops + at, top, mask=head < (kv_head + 1) * GROUP)
    tl.store(totals + at, total, mask=head < (kv_head + 1) * GROUP)


@triton.jit(do_not_specialize=["parts"])
def _join_parts(
    sums, tops, totals, out, lse, parts, D: tl.constexpr, D_PAD: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Join the parts of one row."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    dim = tl.arange(0, D_PAD)
    acc = tl.zeros([D_PAD], tl.float32)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        within = part < parts
        at = part * rows + row
        these = tl.load(tops + at, mask=within, other=LOWEST)
        new_top = tl.maximum(top, tl.max(these, 0))
        share = tl.exp2(these - new_top)
        inside = within[:, None] & (dim < D)[None, :]
        values = tl.load(sums + at[:, None] * D + dim[None, :], mask=inside, other=0.0)
        old = tl.exp2(top - new_top)
        acc = acc * old + tl.sum(values * share[:, None], 0)
        total = total * old + tl.sum(tl.load(totals + at, mask=within, other=0.0) * share, 0)
        top = new_top
    some = tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + dim, (acc / some).to(out.dtype.element_ty), mask=dim < D)
    logarithm = tl.where(total > 0, (top + tl.log2(some)) * LN2, float("-inf"))
    tl.store(lse + row + tl.arange(0, 1), logarithm)
