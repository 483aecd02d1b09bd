"""The normaliser of stage 2: per query and head, the logsumexp of its logits over visible windows.

A program holds the queries of a few tokens and all heads of their group as rows, and walks over the
windows with a running maximum and sum. Each of the `LANES` columns of a tensor core's accumulator
has its own: a thread then never asks another for a maximum, and they are put together at the end.

Logarithms are to the base 2, with `scale * log2(e)` folded into the logits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.packing import Lengths, Windows, num_slots
from infllmv2_reference.geometry import num_windows as num_windows_of

from .device import launching_on
from .product import product_in_steps
from .sequences import find_tile, length, num_windows, share
from .tuning import lse_tile, num_parts, padded_dim

LANES = 8
LOG2_E = math.log2(math.e)


@triton.jit
def _advance(logits, top, total, scale):
    """Take a tile of logits `[rows, windows]` into the maxima and sums `[rows, lanes]`."""
    ROWS: tl.constexpr = logits.shape[0]
    LANES: tl.constexpr = top.shape[1]
    folded = tl.reshape(logits, [ROWS, logits.shape[1] // LANES, LANES])
    highest = tl.maximum(top, tl.max(folded, axis=1))
    shift = tl.where(highest == float("-inf"), 0.0, highest * scale)
    weights = tl.exp2(folded * scale - shift[:, None, :])
    return highest, total * tl.exp2(top * scale - shift) + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["batch", "total_q", "dense_len", "covered"])
def lse_kernel(
    q,
    windows,
    lse,
    ends_q,
    ends_k,
    starts_c,
    batch,
    total_q,
    dense_len,
    covered,
    q_row_stride,
    q_head_stride,
    c_head_stride,
    scale,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    C_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOWS: tl.constexpr,
    STAGES: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the LSE of a tile of tokens over a part of the windows; -inf where none is visible."""
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    sequence, start, rows, first = find_tile(slot, ends_q, batch, TOKENS)
    num_keys = length(ends_k, sequence)
    past = num_keys - rows + first  # position of the first token
    last = past + tl.minimum(TOKENS, rows - first) - 1
    if (first >= rows) | (num_keys < dense_len) | (last // BLOCK < covered):
        return
    row = tl.arange(0, TOKENS * GROUP_PAD)
    token = row // GROUP_PAD
    member = row % GROUP_PAD
    dims = tl.arange(0, D_PAD)
    inside = (first + token < rows) & (member < GROUP)
    q_at = q + (start + first).to(tl.int64) * q_row_stride + kv_head * GROUP * q_head_stride
    q_at += (token * q_row_stride + member.to(tl.int64) * q_head_stride)[:, None]
    if STEP == 0:
        q_mask = inside[:, None] & (dims < D)[None, :]
        queries = tl.load(q_at + dims[None, :], mask=q_mask, other=0.0)
    visible = num_windows(past + token + 1, SIZE, STRIDE)
    count = num_windows(last + 1, SIZE, STRIDE)
    whole = num_windows(past + 1, SIZE, STRIDE) // WINDOWS * WINDOWS  # visible to all tokens
    window = tl.arange(0, WINDOWS)
    c_at = windows + tl.load(starts_c + sequence).to(tl.int64) * C_ROW + kv_head * c_head_stride
    c_at += (window * C_ROW)[None, :]
    top = tl.full([TOKENS * GROUP_PAD, LANES], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * GROUP_PAD, LANES], tl.float32)
    begin, end = share(count, tl.program_id(2), tl.num_programs(2), WINDOWS)
    if STEP == 0:
        for c in tl.range(begin, tl.minimum(whole, end), WINDOWS, num_stages=STAGES):
            keys_at = c_at + tl.cast(c, tl.int64) * C_ROW + dims[:, None]
            if D == D_PAD:
                keys = tl.load(keys_at)
            else:
                keys = tl.load(keys_at, mask=(dims < D)[:, None], other=0.0)
            top, total = _advance(tl.dot(queries, keys), top, total, scale)
        begin = tl.maximum(begin, whole)
    for c in tl.range(begin, end, WINDOWS, num_stages=1):
        keys_at = c_at + tl.cast(c, tl.int64) * C_ROW
        exists = (c + window < count)[None, :]
        if STEP == 0:
            mask = exists & (dims < D)[:, None]
            logits = tl.dot(queries, tl.load(keys_at + dims[:, None], mask=mask, other=0.0))
        else:
            logits = product_in_steps(q_at, keys_at, inside[:, None], exists, D, STEP)
        logits = tl.where((c + window)[None, :] < visible[:, None], logits, float("-inf"))
        top, total = _advance(logits, top, total, scale)
    highest = tl.max(top, axis=1)
    shift = tl.where(highest == float("-inf"), 0.0, highest * scale)
    total = tl.sum(total * tl.exp2(top * scale - shift[:, None]), axis=1)
    result = tl.where(total > 0.0, shift + tl.log2(total), float("-inf"))
    heads = tl.num_programs(1) * GROUP
    line = tl.program_id(2).to(tl.int64) * total_q + start + first
    out = lse + line * heads + kv_head * GROUP
    tl.store(out + token * heads + member, result, mask=inside)


def window_lse(
    q: Tensor,
    windows: Windows,
    lengths: Lengths,
    block_size: int,
    covered: int = 0,
    dense_len: int = -1,
) -> Tensor:
    """Return the LSE to the base 2 over visible windows, in parts: float32 `[parts, total_q, HQ]`.

    Args:
        q: queries `[total_q, HQ, D]`, of unit stride in the last axis.
        windows: those of K_C1 or K_C2.
        lengths: of the batch.
        block_size: B.
        covered: rows with at most so many visible blocks may stay unwritten: they select them all.
        dense_len: rows of sequences of fewer keys may stay unwritten.

    Returns:
        Numbers whose logsumexp over the parts is the LSE; -inf for none.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    tile = lse_tile(q.dtype, head_dim, group, lengths.max_seqlen_q)
    slots = num_slots(total_q, lengths.batch, tile.tokens)
    most = num_windows_of(lengths.max_seqlen_k, windows.size, windows.stride)
    parts = num_parts(slots * num_kv_heads, -(-most // tile.windows))
    lse = torch.empty((parts, total_q, num_heads), dtype=torch.float32, device=q.device)
    scale = LOG2_E * head_dim**-0.5
    if slots:
        with launching_on(q):
            lse_kernel[slots, num_kv_heads, parts](
                q,
                windows.means,
                lse,
                lengths.ends_q,
                lengths.ends_k,
                windows.starts,
                lengths.batch,
                total_q,
                dense_len,
                covered,
                q.stride(0),
                q.stride(1),
                windows.means.stride(1),
                scale,
                GROUP=group,
                GROUP_PAD=triton.next_power_of_2(group),
                D=head_dim,
                D_PAD=padded_dim(head_dim),
                SIZE=windows.size,
                STRIDE=windows.stride,
                C_ROW=windows.means.stride(0),
                BLOCK=block_size,
                TOKENS=tile.tokens,
                WINDOWS=tile.windows,
                STAGES=tile.stages,
                STEP=tile.step,
                LANES=LANES,
                num_warps=tile.warps,
                maxnreg=tile.registers,
            )
    return lse
