"""The normaliser for Hopper GPUs: as `lse.py`, with groups of warps that multiply ahead.

Two groups of four warps have 64 rows each, a few tokens with all heads of their group; they share
the windows, which a loader brings. While a group takes the exponentials of one tile, the tensor core
already multiplies its next one.
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

from .hopper import WORKER_REGISTERS, WORKER_WARPS, boxes
from .hopper_windows import find_tile, length, load_tiles, num_windows
from .packing import Lengths, Windows

ROWS = gl.constexpr(64)
"""Queries and heads of a group of warps."""
WINDOWS = gl.constexpr(128)
"""Windows that are multiplied at once."""
LANES = gl.constexpr(8)
"""Columns of a product that have maxima and sums of their own."""
STAGES = {64: 6, 128: 3}
"""Tiles of windows that shared memory holds at a time, by head dim."""


@gluon.jit
def _advance(logits, top, total, scale):
    """Take a tile of logits into the maxima and sums `[ROWS, LANES]`."""
    folded = gl.reshape(logits, [ROWS, WINDOWS // LANES, LANES])
    highest = gl.maximum(top, gl.max(folded, 1))
    shift = gl.where(highest == float("-inf"), 0.0, highest * scale)
    weights = gl.exp2(folded * scale - gl.expand_dims(shift, 1))
    return highest, total * gl.exp2(top * scale - shift) + gl.sum(weights, 1)


@gluon.jit
def _take_pairs(
    begin, end, even, queries, visible, top, total, scale, ring, full, empty,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take the tiles from `begin` to `end`, two at a time; `even` is the product of the first.

    Returns the product of tile `end`, and the maxima and sums.
    """
    layout: gl.constexpr = even.type.tensor_type.layout
    zero = gl.zeros([ROWS, WINDOWS], gl.float32, layout)
    window = gl.arange(0, WINDOWS, gl.SliceLayout(0, layout))
    for i in range(begin, end, 2):
        stage = (i + 1) % STAGES
        mbarrier.wait(full.index(stage), ((i + 1) // STAGES) & 1)
        keys = ring.index(stage).permute((1, 0))
        odd = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[even])
        mbarrier.arrive(empty.index(i % STAGES), count=1)
        if MASKED:
            sees = (i * WINDOWS + window)[None, :] < visible[:, None]
            logits = gl.where(sees, logits, float("-inf"))
        top, total = _advance(logits, top, total, scale)
        stage = (i + 2) % STAGES
        mbarrier.wait(full.index(stage), ((i + 2) // STAGES) & 1)
        keys = ring.index(stage).permute((1, 0))
        even = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[odd])
        mbarrier.arrive(empty.index((i + 1) % STAGES), count=1)
        if MASKED:
            sees = ((i + 1) * WINDOWS + window)[None, :] < visible[:, None]
            logits = gl.where(sees, logits, float("-inf"))
        top, total = _advance(logits, top, total, scale)
    return even, top, total


@gluon.jit
def _normalise_rows(
    q, lse, q_rows, ring, full, empty, left, tiles, past, heads, q_row_stride, q_head_stride, scale,
    INDEX: gl.constexpr, GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D: gl.constexpr,
    SIZE: gl.constexpr, STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows, as group `INDEX` of the program's warps."""
    TOKENS: gl.constexpr = ROWS // GROUP_PAD
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WINDOWS, 16])
    line: gl.constexpr = gl.SliceLayout(1, product)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    row = gl.arange(0, ROWS, gl.SliceLayout(1, rows))
    token = INDEX * TOKENS + row // GROUP_PAD
    member = row % GROUP_PAD
    inside = (token < left) & (member < GROUP)
    q_at = (token * q_row_stride + member.to(gl.int64) * q_head_stride)[:, None]
    q_at = q_at + gl.arange(0, D, gl.SliceLayout(0, rows))[None, :]
    queries = q_rows.index(INDEX)
    queries.store(gl.load(q + q_at, mask=inside[:, None], other=0.0))
    fence_async_shared()

    row = gl.arange(0, ROWS, line)
    token = INDEX * TOKENS + row // GROUP_PAD
    member = row % GROUP_PAD
    inside = (token < left) & (member < GROUP)
    visible = num_windows(past + token + 1, SIZE, STRIDE)
    some = num_windows(past + INDEX * TOKENS + 1, SIZE, STRIDE)
    zero = gl.zeros([ROWS, WINDOWS], gl.float32, product)
    folded = gl.reshape(zero, [ROWS, WINDOWS // LANES, LANES])
    lanes: gl.constexpr = gl.SliceLayout(1, folded.type.layout)
    top = gl.full([ROWS, LANES], float("-inf"), gl.float32, lanes)
    total = gl.zeros([ROWS, LANES], gl.float32, lanes)
    if tiles > 0:
        mbarrier.wait(full.index(0), 0)
        keys = ring.index(0).permute((1, 0))
        even = warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)
        whole = some // (2 * WINDOWS) * 2  # tiles that all rows see
        end = tiles // 2 * 2
        even, top, total = _take_pairs(
            0, whole, even, queries, visible, top, total, scale, ring, full, empty, False, STAGES
        )
        even, top, total = _take_pairs(
            whole, end, even, queries, visible, top, total, scale, ring, full, empty, True, STAGES
        )
        logits = warpgroup_mma_wait(0, deps=[even])
        if end < tiles:  # else it was multiplied in vain
            window = end * WINDOWS + gl.arange(0, WINDOWS, gl.SliceLayout(0, product))
            logits = gl.where(window[None, :] < visible[:, None], logits, float("-inf"))
            top, total = _advance(logits, top, total, scale)
    highest = gl.max(top, 1)
    shift = gl.where(highest == float("-inf"), 0.0, highest * scale)
    total = gl.sum(total * gl.exp2(top * scale - shift[:, None]), 1)
    result = gl.where(total > 0.0, shift + gl.log2(total), float("-inf"))
    result = gl.convert_layout(result, line)
    gl.store(lse + token * heads + member, result, mask=inside)


@gluon.jit(do_not_specialize=["batch", "dense_len", "covered"])
def _normalise_tile(
    tiles_of, q, lse, ends_q, ends_k, starts_c, batch, dense_len, covered, q_row_stride, q_head_stride,
    scale,
    GROUP: gl.constexpr, GROUP_PAD: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr,
    STRIDE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = 2 * ROWS // GROUP_PAD
    kv_head = gl.program_id(1)
    head = kv_head.to(gl.int64)
    slot = gl.num_programs(0) - 1 - gl.program_id(0)  # the longest rows first
    sequence, start, rows, first = find_tile(slot, ends_q, batch, TOKENS)
    num_keys = length(ends_k, sequence)
    past = num_keys - rows + first
    last = past + gl.minimum(TOKENS, rows - first) - 1
    works = (first < rows) & (num_keys >= dense_len) & (last // BLOCK >= covered)
    count = num_windows(last + 1, SIZE, STRIDE)
    tiles = gl.where(works, (count + WINDOWS - 1) // WINDOWS, 0)
    loaded = gl.where(tiles > 0, tiles // 2 * 2 + 1, 0)  # an odd number: see `_take_pairs`
    left = gl.where(works, rows - first, 0)
    heads = gl.num_programs(1) * GROUP
    q += (start + first).to(gl.int64) * q_row_stride + head * GROUP * q_head_stride
    lse += (start + first).to(gl.int64) * heads + kv_head * GROUP
    row = gl.load(starts_c + sequence)
    ring = gl.allocate_shared_memory(tiles_of.dtype, [STAGES, WINDOWS, D], tiles_of.layout)
    q_rows = gl.allocate_shared_memory(tiles_of.dtype, [2, ROWS, D], tiles_of.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize(
        [
            (_normalise_rows, (
                q, lse, q_rows, ring, full, empty, left, tiles, past, heads, q_row_stride,
                q_head_stride, scale, 0, GROUP, GROUP_PAD, D, SIZE, STRIDE, STAGES,
            )),
            (_normalise_rows, (
                q, lse, q_rows, ring, full, empty, left, tiles, past, heads, q_row_stride,
                q_head_stride, scale, 1, GROUP, GROUP_PAD, D, SIZE, STRIDE, STAGES,
            )),
            (load_tiles, (tiles_of, row, kv_head * D, loaded, ring, full, empty, STAGES)),
        ],
        WORKER_WARPS,
        WORKER_REGISTERS,
    )  # fmt: skip


def write_lse(
    q: Tensor,
    windows: Windows,
    lse: Tensor,
    lengths: Lengths,
    slots: int,
    scale: float,
    block_size: int,
    covered: int,
    dense_len: int,
) -> None:
    """Write the LSE of all queries into `lse`, `[total_q, HQ]`; see `lse.window_lse`."""
    num_kv_heads, head_dim = windows.means.shape[1:]
    group = q.shape[1] // num_kv_heads
    _normalise_tile[slots, num_kv_heads](
        boxes(windows.means, WINDOWS.value, head_dim),
        q,
        lse,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        dense_len,
        covered,
        q.stride(0),
        q.stride(1),
        scale,
        GROUP=group,
        GROUP_PAD=triton.next_power_of_2(group),
        D=head_dim,
        SIZE=windows.size,
        STRIDE=windows.stride,
        BLOCK=block_size,
        STAGES=STAGES[head_dim],
        num_warps=4,
    )
