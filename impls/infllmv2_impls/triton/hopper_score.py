"""Pooled scores for Hopper GPUs: as `score.py`, with groups of warps that multiply ahead.

A program has two groups of four warps and one warp that loads. Each group has the queries of a few
tokens and all heads of theirs; both share the windows, which the loader brings by the copy engine. While
a group takes the exponentials of one tile, the tensor core already multiplies its next one.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from infllmv2_reference.config import SparseConfig

from .hopper import WORKER_REGISTERS, WORKER_WARPS, boxes
from .hopper_windows import find_tile, length, load_tiles, num_windows
from .packing import Lengths, Lines, Windows

WINDOWS = gl.constexpr(64)
"""Windows that are multiplied at once."""
COLUMNS = gl.constexpr(128)
"""Queries and heads of a group of warps."""
BY_BLOCK = gl.constexpr(gl.BlockedLayout([1, 1], [32, 1], [1, 4], [0, 1]))
"""Who holds the scores of blocks, `[blocks, tokens]`: the 32 of a warp are stored together."""
STAGES = {64: 8, 128: 4}
"""Tiles of windows that shared memory holds at a time, by head dim."""


@gluon.jit
def _sum_group(acc, norm, scale, TOKENS: gl.constexpr, GROUP_PAD: gl.constexpr):
    """Return the scores `[WINDOWS, TOKENS]` of a product."""
    LOW: gl.constexpr = min(TOKENS, 8)
    weights = gl.exp2(acc * scale - norm[None, :])
    folded = gl.reshape(weights, [WINDOWS, TOKENS // LOW, GROUP_PAD, LOW])
    return gl.reshape(gl.sum(folded, 2), [WINDOWS, TOKENS])


@gluon.jit
def _store_blocks(
    first, second, window, before, out, left, past, end, columns,
    INDEX: gl.constexpr, TOKENS: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, ALL_VISIBLE: gl.constexpr,
):  # fmt: skip
    """Pool two tiles of scores, from `window` on, and store the blocks that lie before `end`.

    `before` and what is returned are those of `score._pool_tile`.
    """
    PER: gl.constexpr = BLOCK // STRIDE
    EXTRA: gl.constexpr = SIZE // STRIDE - 1
    BLOCKS: gl.constexpr = 2 * WINDOWS // PER
    by_window: gl.constexpr = gl.BlockedLayout([PER, 1], [32, 1], [1, 4], [0, 1])
    scores = gl.permute(gl.join(first, second), [2, 0, 1])
    scores = gl.convert_layout(gl.reshape(scores, [2 * WINDOWS, TOKENS]), by_window)
    scores = gl.maximum(scores, 0.0)  # not NaN, which would leave places unselected
    if not ALL_VISIBLE:
        token = INDEX * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, by_window))
        visible = num_windows(past + token + 1, SIZE, STRIDE)
        at = window + gl.arange(0, 2 * WINDOWS, gl.SliceLayout(1, by_window))
        scores = gl.where(at[:, None] < visible[None, :], scores, float("-inf"))
    folded = gl.reshape(scores, [BLOCKS, PER, TOKENS])
    best = gl.convert_layout(gl.max(folded, 1), BY_BLOCK)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, BY_BLOCK))[:, None]
    token = INDEX * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, BY_BLOCK))[None, :]
    if EXTRA > 0:
        nth: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, folded.type.layout))
        is_late = gl.arange(0, PER, nth)[None, :, None] >= PER - EXTRA
        late = gl.max(gl.where(is_late, folded, float("-inf")), 1)
        late = gl.convert_layout(late, BY_BLOCK)
        source = gl.where(block == BLOCKS - 1, before, late)
        previous = (block + BLOCKS - 1) % BLOCKS + token * 0
        best = gl.maximum(best, gl.gather(source, previous, 0))
        before = late
    block += window // PER
    gl.store(out + token * columns + block, best, mask=(token < left) & (block < end))
    return before


@gluon.jit
def _score_rows(
    q, lse, out, q_rows, ring, full, empty, left, tiles, past, end, heads,
    q_row_stride, q_head_stride, columns, scale,
    INDEX: gl.constexpr, GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D: gl.constexpr,
    SIZE: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr, ALL_VISIBLE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Score the windows for one group's tokens, as group `INDEX` of the program's warps."""
    TOKENS: gl.constexpr = COLUMNS // GROUP_PAD
    LOW: gl.constexpr = min(TOKENS, 8)
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    line: gl.constexpr = gl.SliceLayout(0, product)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, rows))
    token = INDEX * TOKENS + (column // (LOW * GROUP_PAD)) * LOW + column % LOW
    member = (column // LOW) % GROUP_PAD
    inside = (token < left) & (member < GROUP)
    q_at = (token * q_row_stride + member.to(gl.int64) * q_head_stride)[:, None]
    q_at = q_at + gl.arange(0, D, gl.SliceLayout(0, rows))[None, :]
    queries = q_rows.index(INDEX)
    queries.store(gl.load(q + q_at, mask=inside[:, None], other=0.0))
    fence_async_shared()
    queries = queries.permute((1, 0))

    column = gl.arange(0, COLUMNS, line)
    token = INDEX * TOKENS + (column // (LOW * GROUP_PAD)) * LOW + column % LOW
    member = (column // LOW) % GROUP_PAD
    inside = (token < left) & (member < GROUP)
    norm = gl.load(lse + token * heads + member, mask=inside, other=float("-inf"))
    norm = gl.where(norm == float("-inf"), float("inf"), norm)

    zero = gl.zeros([WINDOWS, COLUMNS], gl.float32, product)
    before = gl.full([2 * WINDOWS * STRIDE // BLOCK, TOKENS], float("-inf"), gl.float32, BY_BLOCK)
    if tiles > 0:
        pairs = tiles // 2 * 2
        mbarrier.wait(full.index(0), 0)
        even = warpgroup_mma(ring.index(0), queries, zero, use_acc=False, is_async=True)
        for i in range(0, pairs, 2):
            stage = (i + 1) % STAGES
            mbarrier.wait(full.index(stage), ((i + 1) // STAGES) & 1)
            odd = warpgroup_mma(ring.index(stage), queries, zero, use_acc=False, is_async=True)
            even = warpgroup_mma_wait(1, deps=[even])
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            first = _sum_group(even, norm, scale, TOKENS, GROUP_PAD)
            stage = (i + 2) % STAGES
            mbarrier.wait(full.index(stage), ((i + 2) // STAGES) & 1)
            even = warpgroup_mma(ring.index(stage), queries, zero, use_acc=False, is_async=True)
            odd = warpgroup_mma_wait(1, deps=[odd])
            mbarrier.arrive(empty.index((i + 1) % STAGES), count=1)
            second = _sum_group(odd, norm, scale, TOKENS, GROUP_PAD)
            before = _store_blocks(
                first, second, i * WINDOWS, before, out, left, past, end, columns, INDEX, TOKENS,
                SIZE, STRIDE, BLOCK, ALL_VISIBLE,
            )  # fmt: skip
        even = warpgroup_mma_wait(0, deps=[even])
        if pairs < tiles:  # else it was multiplied in vain
            first = _sum_group(even, norm, scale, TOKENS, GROUP_PAD)
            _store_blocks(
                first, first, pairs * WINDOWS, before, out, left, past, end, columns, INDEX, TOKENS,
                SIZE, STRIDE, BLOCK, ALL_VISIBLE,
            )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "batch", "total_q", "dense_len", "covered", "local", "first_slot", "lines", "columns64"
    ]
)  # fmt: skip
def _score_tile(
    tiles_of, q, lse, scores, ends_q, ends_k, starts_c, batch, total_q, dense_len, covered, local,
    first_slot, lines, columns64, q_row_stride, q_head_stride, scale,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr,
    STRIDE: gl.constexpr, BLOCK: gl.constexpr, ALL_VISIBLE: gl.constexpr, BY_SLOT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 2 * COLUMNS // GROUP_PAD
    PER: gl.constexpr = BLOCK // STRIDE
    kv_head = gl.program_id(1)
    head = kv_head.to(gl.int64)
    slot = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest rows first
    sequence, start, rows, first = find_tile(first_slot + slot, ends_q, batch, TOKENS)
    num_keys = length(ends_k, sequence)
    past = num_keys - rows + first
    last = past + gl.minimum(TOKENS, rows - first) - 1
    works = (first < rows) & (num_keys >= dense_len) & (last // BLOCK >= covered)
    end = gl.where(works, gl.maximum(last // BLOCK - local + 1, 0), 0)  # of blocks that compete
    tiles = (end * PER + WINDOWS - 1) // WINDOWS
    loaded = gl.where(tiles > 0, tiles // 2 * 2 + 1, 0)  # an odd number: one is ahead of each pair
    heads = gl.num_programs(1) * GROUP
    q += (start + first).to(gl.int64) * q_row_stride + head * GROUP * q_head_stride
    lse += (start + first).to(gl.int64) * heads + kv_head * GROUP
    columns = columns64 * 64
    line = slot * TOKENS if BY_SLOT else start + first
    out = scores + (head * lines + line) * columns
    row = gl.load(starts_c + sequence)
    ring = gl.allocate_shared_memory(tiles_of.dtype, [STAGES, WINDOWS, D], tiles_of.layout)
    q_rows = gl.allocate_shared_memory(tiles_of.dtype, [2, COLUMNS, D], tiles_of.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    left = rows - first
    gl.warp_specialize(
        [
            (_score_rows, (
                q, lse, out, q_rows, ring, full, empty, left, tiles, past, end, heads,
                q_row_stride, q_head_stride, columns, scale,
                0, GROUP, GROUP_PAD, D, SIZE, STRIDE, BLOCK, ALL_VISIBLE, STAGES,
            )),
            (_score_rows, (
                q, lse, out, q_rows, ring, full, empty, left, tiles, past, end, heads,
                q_row_stride, q_head_stride, columns, scale,
                1, GROUP, GROUP_PAD, D, SIZE, STRIDE, BLOCK, ALL_VISIBLE, STAGES,
            )),
            (load_tiles, (tiles_of, row, kv_head * D, loaded, ring, full, empty, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


def write_scores(
    q: Tensor,
    windows: Windows,
    lse: Tensor,
    lengths: Lengths,
    config: SparseConfig,
    lines: Lines,
    scale: float,
    all_visible: bool,
    covered: int,
    dense_len: int,
) -> None:
    """Write the scores of blocks that compete; see `score.write_scores`. `lse`: `[total_q, HQ]`."""
    num_kv_heads, head_dim = windows.means.shape[1:]
    group = q.shape[1] // num_kv_heads
    _score_tile[lines.slots, num_kv_heads](
        boxes(windows.means, WINDOWS.value, head_dim),
        q,
        lse,
        lines.data,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        q.shape[0],
        dense_len,
        covered,
        config.local_blocks,
        lines.first_slot,
        lines.data.shape[1],
        lines.data.shape[2] // 64,
        q.stride(0),
        q.stride(1),
        scale,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        D=head_dim,
        SIZE=windows.size,
        STRIDE=windows.stride,
        BLOCK=config.block_size,
        ALL_VISIBLE=all_visible,
        BY_SLOT=lines.by_slot,
        STAGES=STAGES[head_dim],
        num_warps=4,
    )
