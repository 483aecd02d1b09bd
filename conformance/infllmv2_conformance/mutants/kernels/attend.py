"""Stage 5, a program for every few query rows of a key/value head."""
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportIndexIssue=false
# ruff: noqa: N803 - capitals are what a kernel is compiled for

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 3
"""Query rows of one program, one after the other."""


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    selected,
    starts,
    positions,
    out,
    lse,
    total_q,
    scale,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Attend the selected blocks of `ROWS` rows for one key/value head, by an online softmax."""
    kv_head = tl.program_id(1)
    group = tl.arange(0, GROUP_TILE)
    dims = tl.arange(0, DIM_TILE)
    tokens = tl.arange(0, BLOCK)
    real = (group < GROUP)[:, None] & (dims < DIM)[None, :]
    for step in range(ROWS):
        row = tl.program_id(0) * ROWS + step
        top = tl.full([GROUP_TILE], -float("inf"), tl.float32)
        total = tl.zeros([GROUP_TILE], tl.float32)
        sums = tl.zeros([GROUP_TILE, DIM_TILE], tl.float32)
        if row < total_q:
            heads = (row * HEADS + kv_head) * GROUP + group
            at_q = heads[:, None] * DIM + dims[None, :]
            queries = tl.load(q + at_q, mask=real, other=0.0).to(tl.float32)
            start = tl.load(starts + row)
            position = tl.load(positions + row)
            for slot in range(SLOTS):
                block = tl.load(selected + (kv_head * total_q + row) * SLOTS + slot)
                if block >= 0:
                    at = block * BLOCK + tokens
                    there = at <= position
                    at_k = ((start + at) * HEADS + kv_head)[:, None] * DIM + dims[None, :]
                    loaded = there[:, None] & (dims < DIM)[None, :]
                    keys = tl.load(k + at_k, mask=loaded, other=0.0).to(tl.float32)
                    values = tl.load(v + at_k, mask=loaded, other=0.0).to(tl.float32)
                    logits = tl.sum(queries[:, None, :] * keys[None, :, :], 2) * scale
                    logits = tl.where(there[None, :], logits, -float("inf"))
                    new_top = tl.maximum(top, tl.max(logits, 1))
                    weights = tl.exp(logits - new_top[:, None])
                    rescale = tl.exp(top - new_top)
                    total = total * rescale + tl.sum(weights, 1)
                    products = tl.sum(weights[:, :, None] * values[None, :, :], 1)
                    sums = sums * rescale[:, None] + products
                    top = new_top
            some = tl.where(total == 0, 1.0, total)
            tl.store(out + at_q, sums / some[:, None], mask=real)
            tl.store(lse + heads, top + tl.log(some), mask=group < GROUP)


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Attend the blocks `selected`: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`."""
    total_q, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty_like(q)
    lse = torch.empty(total_q, num_heads, dtype=torch.float32, device=q.device)
    starts, positions = row_places(cu_seqlens_q, cu_seqlens_k)
    grid = (triton.cdiv(total_q, ROWS), num_kv_heads)
    if total_q:
        attend_kernel[grid](
            q,
            k,
            v,
            selected,
            starts,
            positions,
            out,
            lse,
            total_q,
            dim**-0.5,
            SLOTS=selected.shape[2],
            BLOCK=block_size,
            HEADS=num_kv_heads,
            GROUP=group,
            DIM=dim,
            ROWS=ROWS,
            GROUP_TILE=triton.next_power_of_2(group),
            DIM_TILE=triton.next_power_of_2(dim),
        )
    return out, lse


def row_places(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every query row the first key row of its sequence, and its position, int64."""
    q_lengths, k_lengths = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    starts = cu_seqlens_k[:-1].long().repeat_interleave(q_lengths)
    last = (k_lengths - cu_seqlens_q[1:].long()).repeat_interleave(q_lengths)
    return starts, last + torch.arange(len(starts), device=starts.device)
