"""Where a program works: which sequence of a packed batch its tile of rows belongs to.

A grid must be known without a look at lengths, which lie on the device. `packing.num_slots` counts
tiles for the worst case, and `find_tile` maps a slot to a sequence and a tile of its rows, or to
nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(slot, ends, batch, TILE: tl.constexpr):
    """Return the sequence of a slot, its first row, its number of rows, and the tile's first row.

    The last counts from the sequence's first row; a slot without work has it beyond the rows.
    """
    low = 0
    high = batch  # the sequence is one of low .. high - 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(ends + middle) // TILE + middle <= slot:
            low = middle
        else:
            high = middle
    start = tl.load(ends + low)
    rows = tl.load(ends + low + 1) - start
    return low, start, rows, (slot - (start // TILE + low)) * TILE


@triton.jit
def length(ends, sequence):
    """Return how many rows a sequence has."""
    return tl.load(ends + sequence + 1) - tl.load(ends + sequence)


@triton.jit
def num_windows(num_keys, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Count the complete windows in so many keys: numbers, or tensors of them."""
    return tl.where(num_keys >= SIZE, (num_keys - SIZE) // STRIDE + 1, 0)


@triton.jit
def share(total, part, parts, STEP: tl.constexpr):
    """Return begin and end of one of `parts` shares of `0 .. total - 1`, in whole steps."""
    each = tl.cdiv(tl.cdiv(total, STEP), parts) * STEP
    begin = tl.minimum(part * each, total)
    return begin, tl.minimum(begin + each, total)
