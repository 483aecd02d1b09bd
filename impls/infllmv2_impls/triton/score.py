"""Stages 2 and 3: scores of windows, summed over the heads of a group, and pooled into blocks.

A program holds the queries of a few tokens and all heads of their group, and walks over the
windows. It computes the product transposed, windows by queries: an accumulator of the tensor core
then has all heads of a token in one thread, so that the sum over the group costs no exchange
between threads, and only one number per window and token is left to mask, to pool and to store.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines, Windows
from infllmv2_reference.config import SparseConfig

from .device import launching_on
from .lse import LOG2_E
from .product import product_in_steps
from .sequences import find_tile, length, num_windows, share
from .tuning import Tile, num_parts, padded_dim


@triton.jit
def _window_of_row(row, WINDOWS: tl.constexpr):
    """Return which window of a tile is loaded into a row of the product.

    A thread of a warp group holds the rows `r` and `r + 8`, and the same of every further 64. The
    windows there are neighbours, so that pooling begins inside a thread.
    """
    if WINDOWS >= 64:
        FOLDS: tl.constexpr = WINDOWS // 64
        row = (row // 8) % 2 + 2 * (row // 64) + 2 * FOLDS * (row % 8 + 8 * ((row // 16) % 4))
    return row


@triton.jit
def _in_order(scores):
    """Undo `_window_of_row`: `[WINDOWS, TOKENS]` in the order of the windows."""
    WINDOWS: tl.constexpr = scores.shape[0]
    TOKENS: tl.constexpr = scores.shape[1]
    if WINDOWS >= 64:
        folded = tl.reshape(scores, [WINDOWS // 64, 4, 2, 8, TOKENS])
        scores = tl.reshape(tl.permute(folded, [1, 3, 0, 2, 4]), [WINDOWS, TOKENS])
    return scores


@triton.jit
def _load_norm(lse_at, inside, parts, part_stride):
    """Return the LSE of every column, put together from `parts`; +inf without one: score 0."""
    norm = tl.load(lse_at, mask=inside, other=float("-inf"))
    for part in range(1, parts):
        more = tl.load(lse_at + part * part_stride, mask=inside, other=float("-inf"))
        high = tl.maximum(norm, more)
        low = tl.minimum(norm, more)
        gap = tl.where(low == float("-inf"), float("-inf"), low - high)
        norm = high + tl.log2(1.0 + tl.exp2(gap))
    return tl.where(norm == float("-inf"), float("inf"), norm)


@triton.jit
def _sum_group(exponents, GROUP_PAD: tl.constexpr):
    """Return the sums over the group of 2**exponents: `[WINDOWS, TOKENS]`, windows in order."""
    WINDOWS: tl.constexpr = exponents.shape[0]
    TOKENS: tl.constexpr = exponents.shape[1] // GROUP_PAD
    LOW: tl.constexpr = min(TOKENS, 8)
    weights = tl.reshape(tl.exp2(exponents), [WINDOWS, TOKENS // LOW, GROUP_PAD, LOW])
    return _in_order(tl.reshape(tl.sum(weights, axis=2), [WINDOWS, TOKENS]))


@triton.jit
def _pool_tile(scores, before, PER: tl.constexpr, EXTRA: tl.constexpr):
    """Pool windows `[WINDOWS, TOKENS]` into blocks of `PER` and the `EXTRA` windows before each.

    Returns the blocks `[BLOCKS, TOKENS]`, and what the next tile takes as `before`: the highest of
    every block's last `EXTRA` windows, of which its first block needs those of this tile's last.
    """
    BLOCKS: tl.constexpr = scores.shape[0] // PER
    TOKENS: tl.constexpr = scores.shape[1]
    folded = tl.reshape(scores, [BLOCKS, PER, TOKENS])
    best = tl.max(folded, axis=1)
    if EXTRA > 0:
        is_late = tl.arange(0, PER)[None, :, None] >= PER - EXTRA
        late = tl.max(tl.where(is_late, folded, float("-inf")), axis=1)
        block = tl.arange(0, BLOCKS)[:, None]
        source = tl.where(block == BLOCKS - 1, before, late)
        previous = tl.broadcast_to((block + BLOCKS - 1) % BLOCKS, [BLOCKS, TOKENS])
        best = tl.maximum(best, tl.gather(source, previous, 0))
        before = late
    return best, before


_LENGTHS = ["batch", "total_q", "dense_len", "covered", "local", "first_slot", "lines", "columns64"]


@triton.jit(do_not_specialize=_LENGTHS)
def score_kernel(
    q,
    windows,
    lse,
    scores,
    ends_q,
    ends_k,
    starts_c,
    batch,
    total_q,
    dense_len,
    covered,
    local,
    first_slot,
    lines,
    columns64,
    parts,
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
    POOLED: tl.constexpr,
    ALL_VISIBLE: tl.constexpr,
    BY_SLOT: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOWS: tl.constexpr,
    STAGES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the scores of a tile of tokens, of windows or `POOLED` of blocks that compete."""
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    sequence, start, rows, first = find_tile(first_slot + slot, ends_q, batch, TOKENS)
    num_keys = length(ends_k, sequence)
    past = num_keys - rows + first  # position of the first token
    last = past + tl.minimum(TOKENS, rows - first) - 1
    if (first >= rows) | (num_keys < dense_len) | (last // BLOCK < covered):
        return
    # Columns are 8 tokens of one head, of the next head, ... so that a thread has all heads.
    LOW: tl.constexpr = min(TOKENS, 8)
    column = tl.arange(0, TOKENS * GROUP_PAD)
    of_token = (column // (LOW * GROUP_PAD)) * LOW + column % LOW
    member = (column // LOW) % GROUP_PAD
    dims = tl.arange(0, D_PAD)
    inside = (of_token < rows - first) & (member < GROUP)
    q_at = q + (start + first).to(tl.int64) * q_row_stride + kv_head * GROUP * q_head_stride
    q_at += of_token * q_row_stride + member.to(tl.int64) * q_head_stride
    if STEP == 0:
        q_mask = inside[:, None] & (dims < D)[None, :]
        queries = tl.trans(tl.load(q_at[:, None] + dims[None, :], mask=q_mask, other=0.0))
    heads = tl.num_programs(1) * GROUP
    lse_at = lse + (start + first).to(tl.int64) * heads + kv_head * GROUP
    lse_at += of_token * heads + member
    norm = _load_norm(lse_at, inside, parts, total_q.to(tl.int64) * heads)[None, :]
    token = tl.arange(0, TOKENS)
    visible = num_windows(past + token + 1, SIZE, STRIDE)
    count = num_windows(num_keys, SIZE, STRIDE)
    columns = columns64 * 64
    line = slot * TOKENS if BY_SLOT else start + first
    out = scores + (kv_head * lines + line) * columns
    c_at = windows + tl.load(starts_c + sequence).to(tl.int64) * C_ROW + kv_head * c_head_stride
    if POOLED:
        PER: tl.constexpr = BLOCK // STRIDE
        EXTRA: tl.constexpr = SIZE // STRIDE - 1
        end = (last // BLOCK - local + 1) * PER  # also blocks without a window get their -inf
    else:
        PER: tl.constexpr = 1
        EXTRA: tl.constexpr = 0
        end = num_windows(last + 1, SIZE, STRIDE)
    begin, end = share(tl.maximum(end, 0), tl.program_id(2), tl.num_programs(2), WINDOWS)
    warm = begin  # the tile before the first block tells what reaches into it
    if EXTRA > 0:
        warm = tl.maximum(begin - WINDOWS, 0)
    BLOCKS: tl.constexpr = WINDOWS // PER
    out_at = token[None, :] * columns + tl.arange(0, BLOCKS)[:, None]
    window = tl.arange(0, WINDOWS)
    loaded = _window_of_row(window, WINDOWS)
    c_at += (loaded * C_ROW)[:, None]
    before = tl.full([BLOCKS, TOKENS], float("-inf"), tl.float32)
    if STEP == 0:
        whole = tl.minimum(tl.cdiv(end, WINDOWS), count // WINDOWS) * WINDOWS  # they all exist
        for c in tl.range(warm, whole, WINDOWS, num_stages=STAGES):
            keys_at = c_at + tl.cast(c, tl.int64) * C_ROW + dims[None, :]
            if D == D_PAD:
                keys = tl.load(keys_at)
            else:
                keys = tl.load(keys_at, mask=(dims < D)[None, :], other=0.0)
            tile = _sum_group(tl.dot(keys, queries) * scale - norm, GROUP_PAD)
            if POOLED:
                tile = tl.where(tile >= 0.0, tile, 0.0)  # NaN would leave places unselected
            if not ALL_VISIBLE:
                tile = tl.where((c + window)[:, None] < visible[None, :], tile, float("-inf"))
            tile, before = _pool_tile(tile, before, PER, EXTRA)
            mask = (token < rows - first) & (c >= begin)
            tl.store(out + c // PER + out_at, tile, mask=mask[None, :])
        warm = tl.maximum(whole, warm)
    for c in tl.range(warm, end, WINDOWS, num_stages=1):
        keys_at = c_at + tl.cast(c, tl.int64) * C_ROW
        exists = (c + loaded < count)[:, None]
        if STEP == 0:
            mask = exists & (dims < D)[None, :]
            logits = tl.dot(tl.load(keys_at + dims[None, :], mask=mask, other=0.0), queries)
        else:
            logits = product_in_steps(keys_at, q_at[None, :], exists, inside[None, :], D, STEP)
        tile = _sum_group(logits * scale - norm, GROUP_PAD)
        if POOLED:
            tile = tl.where(tile >= 0.0, tile, 0.0)
        tile = tl.where((c + window)[:, None] < visible[None, :], tile, float("-inf"))
        tile, before = _pool_tile(tile, before, PER, EXTRA)
        mask = (token < rows - first) & (c >= begin)
        tl.store(out + c // PER + out_at, tile, mask=mask[None, :])


def can_pool(config: SparseConfig, tile: Tile) -> bool:
    """Say whether blocks can be pooled from tiles of scores, before these are stored.

    Windows must lie alike in all blocks, and those that reach into a block begin in the one before.
    """
    c = config
    per = c.block_size // c.kernel_stride
    return (
        c.pooling == "overlap"
        and c.block_size % c.kernel_stride == 0
        and c.kernel_size % c.kernel_stride == 0
        and per & (per - 1) == 0
        and per <= tile.windows
        and c.kernel_size // c.kernel_stride - 1 <= per
    )


def _competing_are_visible(config: SparseConfig) -> bool:
    """Say whether a block that competes lies so far back that all its windows have ended."""
    reach = config.kernel_size - config.kernel_stride  # at most so far behind the block
    return reach - 1 <= (config.local_blocks - 1) * config.block_size


def write_scores(
    q: Tensor,
    windows: Windows,
    lse: Tensor,
    lengths: Lengths,
    config: SparseConfig,
    tile: Tile,
    lines: Lines,
    *,
    pooled: bool,
    covered: int = 0,
    dense_len: int = -1,
) -> None:
    """Write scores of windows, or `pooled` those of blocks, into `lines`.

    Args:
        q: queries `[total_q, HQ, D]`, of unit stride in the last axis.
        windows: those of K_C1.
        lse: from `window_lse`.
        lengths: of the batch.
        config: blocks, local blocks.
        tile: from `score_tile`.
        lines: where; its columns are a multiple of 64.
        pooled: only blocks that compete are written; their windows must suit `can_pool`.
        covered: rows with at most so many visible blocks may stay unwritten: they select them all.
        dense_len: rows of sequences of fewer keys may stay unwritten.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    steps = -(-lengths.most_windows(config) // tile.windows)
    grid = (lines.slots, num_kv_heads, num_parts(lines.slots * num_kv_heads, steps))
    if not lines.slots:
        return
    scale = LOG2_E * head_dim**-0.5
    all_visible = pooled and _competing_are_visible(config)
    with launching_on(q):
        score_kernel[grid](
            q,
            windows.means,
            lse,
            lines.data,
            lengths.ends_q,
            lengths.ends_k,
            windows.starts,
            lengths.batch,
            total_q,
            dense_len,
            covered,
            config.local_blocks,
            lines.first_slot,
            lines.data.shape[1],
            lines.data.shape[2] // 64,
            lse.shape[0],
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
            BLOCK=config.block_size,
            POOLED=pooled,
            ALL_VISIBLE=all_visible,
            BY_SLOT=lines.by_slot,
            TOKENS=tile.tokens,
            WINDOWS=tile.windows,
            STAGES=tile.stages,
            STEP=tile.step,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
