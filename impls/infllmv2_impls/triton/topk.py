"""Stage 4: the forced blocks and the best-scored ones, ascending, without a sort.

A program finds, for each of its rows, the score from which on a block is chosen: a bisection of the
floats between the least and the highest score, which ends as soon as exactly as many blocks lie
above as are wanted. Then one scan over the row gives every chosen block its place. Of blocks that
tie at the end of the budget the first ones are taken.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines
from infllmv2_reference.config import SparseConfig

from .device import launching_on
from .sequences import find_tile, length
from .tuning import topk_tile


@triton.jit
def _order(x):
    """Map float32 to int32 that ascends with it; both zeros to 0, as they are equal scores."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _value(order):
    """Undo `_order`."""
    sign: tl.constexpr = -(2**31)
    return tl.where(order < 0, -order | sign, order).to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(at, block, last, init, PADDED: tl.constexpr):
    """Return the scores `[ROWS, blocks]` of blocks that compete, -inf at others.

    If lines are `PADDED`, loads are masked in whole groups of 16, so that they stay vectors.
    """
    competes = (block >= init) & (block <= last[:, None])
    if PADDED:
        scores = tl.load(at + block, mask=block // 16 <= last[:, None] // 16, other=0.0)
        scores = tl.where(competes, scores, float("-inf"))
    else:
        scores = tl.load(at + block, mask=competes, other=float("-inf"))
        scores = tl.where(scores == scores, scores, float("-inf"))  # not NaN
    return scores


@triton.jit
def _find_floor(
    at,
    last,
    furthest,
    wanted,
    init,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    LONG: tl.constexpr,
):
    """Return per row a score, and how many blocks with that very score are chosen.

    Those above it are chosen, too, and make up the rest of `wanted`. Where no more blocks compete
    than are wanted, both mean nothing.

    Args:
        at: pointers to the rows' scores, `[ROWS, 1]`.
        last: the last block that competes; all from `init` on do.
        furthest: the highest of `last`.
        wanted: how many blocks to choose.
        init: initial blocks.
        PADDED: as in `_load_scores`.
        WIDTH: the blocks that are held in registers.
        LONG: whether `furthest` may be `WIDTH` or more; those scores are loaded again and again.
    """
    none: tl.constexpr = float("-inf")
    scores = _load_scores(at, tl.arange(0, WIDTH)[None, :], last, init, PADDED)
    is_real = scores > none
    highest = tl.max(scores, axis=1)
    lowest = tl.min(tl.where(is_real, scores, float("inf")), axis=1)
    above_low = tl.sum(is_real.to(tl.int32), axis=1)
    if LONG:
        for begin in range(WIDTH, furthest + 1, WIDTH):
            block = begin + tl.arange(0, WIDTH)[None, :]
            more = _load_scores(at, block, last, init, PADDED)
            is_real = more > none
            highest = tl.maximum(highest, tl.max(more, axis=1))
            lowest = tl.minimum(lowest, tl.min(tl.where(is_real, more, float("inf")), axis=1))
            above_low += tl.sum(is_real.to(tl.int32), axis=1)
    # Above `low` lie `above_low` >= wanted scores, above `high` lie `above_high` < wanted. If there
    # are not so many real scores, those of -inf make up for the rest.
    low = _order(lowest) - 1
    high = _order(highest)
    above_high = wanted * 0
    searching = (above_low > wanted) & (wanted > 0) & (high - 1 > low)
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        bound = _value(middle)[:, None]
        # Scores above a finite bound are counted by the sign of the difference.
        signs = (bound - scores).to(tl.uint32, bitcast=True) >> 31
        count = tl.sum(signs.to(tl.int32), axis=1)
        if LONG:
            for begin in range(WIDTH, furthest + 1, WIDTH):
                block = begin + tl.arange(0, WIDTH)[None, :]
                more = _load_scores(at, block, last, init, PADDED)
                count += tl.sum((more > bound).to(tl.int32), axis=1)
        enough = searching & (count >= wanted)
        short = searching & (count < wanted)
        low = tl.where(enough, middle, low)
        above_low = tl.where(enough, count, above_low)
        high = tl.where(short, middle, high)
        above_high = tl.where(short, count, above_high)
        searching = searching & (above_low > wanted) & (high - 1 > low)
    is_tied = above_low > wanted
    floor = tl.where(is_tied, _value(high), tl.where(above_low < wanted, none, _value(low)))
    return floor, tl.where(is_tied, wanted - above_high, tl.maximum(wanted - above_low, 0))


@triton.jit
def _store_above(
    at,
    out,
    last,
    furthest,
    floor,
    place,
    init,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the blocks with scores above `floor`, from `place` on: nothing ties."""
    for begin in range(0, furthest + 1, CHUNK):
        block = begin + tl.arange(0, CHUNK)[None, :]
        chosen = _load_scores(at, block, last, init, PADDED) > floor[:, None]
        rank = place[:, None] + tl.cumsum(chosen.to(tl.int32), axis=1) - 1
        tl.store(out + rank, tl.broadcast_to(block, [ROWS, CHUNK]), mask=chosen)
        place += tl.sum(chosen.to(tl.int32), axis=1)


@triton.jit
def _store_any(
    at,
    out,
    last,
    furthest,
    floor,
    ties,
    is_all,
    place,
    init,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the blocks above `floor` and the first `ties` at it, or simply all, from `place` on."""
    seen = place * 0
    for begin in range(0, furthest + 1, CHUNK):
        block = begin + tl.arange(0, CHUNK)[None, :]
        competes = (block >= init) & (block <= last[:, None])
        scores = _load_scores(at, block, last, init, PADDED)
        above = competes & (is_all[:, None] | (scores > floor[:, None]))
        level = competes & (scores == floor[:, None]) & (ties > 0)[:, None]
        both = (above.to(tl.int32) << 16) + level.to(tl.int32)
        rank = tl.cumsum(both, axis=1)
        nth = seen[:, None] + (rank & 0xFFFF)
        chosen = above | (level & (nth <= ties[:, None]))
        rank = place[:, None] + (rank >> 16) + tl.minimum(nth, ties[:, None]) - 1
        tl.store(out + rank, tl.broadcast_to(block, [ROWS, CHUNK]), mask=chosen)
        total = tl.sum(both, axis=1)
        place += total >> 16
        seen = tl.minimum(seen + (total & 0xFFFF), ties)


_LENGTHS = ["batch", "total_q", "dense_len", "init", "local", "budget", "first_slot"]


@triton.jit(do_not_specialize=_LENGTHS)
def topk_kernel(
    scores,
    selected,
    ends_q,
    ends_k,
    batch,
    total_q,
    dense_len,
    init,
    local,
    budget,
    first_slot,
    line_stride,
    head_stride,
    BLOCK: tl.constexpr,
    BY_SLOT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the selections of `ROWS` queries of one head; -1 in dense sequences."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) // (TILE // ROWS)
    part = tl.program_id(0) % (TILE // ROWS) * ROWS
    sequence, start, rows, first = find_tile(first_slot + slot, ends_q, batch, TILE)
    first += part
    if first >= rows:
        return
    num_keys = length(ends_k, sequence)
    row = tl.arange(0, ROWS)
    inside = first + row < rows
    own = (num_keys - rows + first + row) // BLOCK
    own = tl.where(inside & (num_keys >= dense_len), own, -1)
    line = (slot * TILE + part if BY_SLOT else start + first) + row
    at = scores + (head * head_stride + line.to(tl.int64) * line_stride)[:, None]
    out = selected + ((head * total_q + start + first + row) * budget)[:, None]

    num_init = tl.minimum(own + 1, init)
    last = own - local
    competing = tl.maximum(last - init + 1, 0)
    num_local = own + 1 - num_init - competing
    wanted = tl.minimum(budget - num_init - num_local, competing)
    for begin in range(0, budget, 128):
        place = begin + tl.arange(0, 128)[None, :]
        behind = place - (num_init + wanted)[:, None]
        later = tl.where(behind < num_local[:, None], (own + 1 - num_local)[:, None] + behind, -1)
        is_forced = (place < num_init[:, None]) | (behind >= 0)
        mask = is_forced & inside[:, None] & (place < budget)
        tl.store(out + place, tl.where(place < num_init[:, None], place, later), mask=mask)
    furthest = tl.max(last, axis=0)
    if furthest >= init:
        if (WIDTH >= 512) & (furthest < WIDTH // 4):
            floor, ties = _find_floor(at, last, furthest, wanted, init, BY_SLOT, WIDTH // 4, False)
        elif (WIDTH >= 512) & (furthest < WIDTH // 2):
            floor, ties = _find_floor(at, last, furthest, wanted, init, BY_SLOT, WIDTH // 2, False)
        else:
            floor, ties = _find_floor(at, last, furthest, wanted, init, BY_SLOT, WIDTH, LONG)
        is_all = competing <= wanted
        ties = tl.where(is_all, 0, ties)
        if tl.max((is_all | (ties > 0)).to(tl.int32), axis=0) == 0:
            _store_above(at, out, last, furthest, floor, num_init, init, BY_SLOT, ROWS, CHUNK)
        else:
            _store_any(
                at, out, last, furthest, floor, ties, is_all, num_init, init, BY_SLOT, ROWS, CHUNK
            )


def write_selection(
    scores: Lines, selected: Tensor, lengths: Lengths, config: SparseConfig, dense_len: int = -1
) -> None:
    """Select by the scores of blocks, into `selected`, int32 `[HK, total_q, budget]`.

    Args:
        scores: of unit stride in the last axis; only those of blocks that compete matter. Lines by
            slot are read in groups of 16, so their columns must be a multiple of that.
        selected: contiguous.
        lengths: of the batch.
        config: block size, initial and local blocks, budget.
        dense_len: sequences of fewer keys get -1.
    """
    num_heads, total_q, _ = selected.shape
    tile = topk_tile(lengths.most_blocks(config), scores.tile)
    grid = (scores.slots * (scores.tile // tile.rows), num_heads)
    if not scores.slots:
        return
    with launching_on(selected):
        topk_kernel[grid](
            scores.data,
            selected,
            lengths.ends_q,
            lengths.ends_k,
            lengths.batch,
            total_q,
            dense_len,
            config.init_blocks,
            config.local_blocks,
            config.budget,
            scores.first_slot,
            scores.data.stride(1),
            scores.data.stride(0),
            BLOCK=config.block_size,
            BY_SLOT=scores.by_slot,
            TILE=scores.tile,
            ROWS=tile.rows,
            WIDTH=tile.width,
            LONG=tile.is_long,
            CHUNK=tile.chunk,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
