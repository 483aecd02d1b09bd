"""Integers only: where windows and blocks lie, who sees them, and which blocks are forced.

Positions are absolute: the query at position `p` sees the key tokens `0..p`, wherever the chunk
that holds the query begins. Windows, blocks and positions count from 0.
"""

from __future__ import annotations


def num_windows(num_keys: int, kernel_size: int, kernel_stride: int) -> int:
    """Count the complete windows in `num_keys` tokens.

    >>> [num_windows(s, kernel_size=32, kernel_stride=16) for s in (0, 31, 32, 47, 48)]
    [0, 0, 1, 1, 2]

    Source: Eq. 4.
    """
    if num_keys < kernel_size:
        return 0
    return (num_keys - kernel_size) // kernel_stride + 1


def window_span(window: int, kernel_size: int, kernel_stride: int) -> tuple[int, int]:
    """Return the first token of a window and the token after its last.

    >>> window_span(3, kernel_size=32, kernel_stride=16)
    (48, 80)
    """
    start = window * kernel_stride
    return start, start + kernel_size


def num_visible_windows(position: int, kernel_size: int, kernel_stride: int) -> int:
    """Count the windows that have ended by `position`: those with `c*s + l - 1 <= p` (decision D2).

    >>> [num_visible_windows(p, kernel_size=32, kernel_stride=16) for p in (30, 31, 46, 47)]
    [0, 1, 1, 2]
    """
    return num_windows(position + 1, kernel_size, kernel_stride)


def num_blocks(num_keys: int, block_size: int) -> int:
    """Count the blocks that hold `num_keys` tokens; the last one may be partial.

    >>> [num_blocks(s, block_size=64) for s in (0, 1, 64, 65)]
    [0, 1, 1, 2]
    """
    return -(-num_keys // block_size)


def overlapping_windows(
    block: int, block_size: int, kernel_size: int, kernel_stride: int
) -> tuple[int, int]:
    """Return the half-open range of window indices that share a token with `block`.

    The range is not cut to the windows that exist or are visible; it never starts below 0.

    >>> overlapping_windows(2, block_size=64, kernel_size=32, kernel_stride=16)
    (7, 12)
    >>> overlapping_windows(0, block_size=64, kernel_size=32, kernel_stride=16)
    (0, 4)

    Source: Eq. 7, read as overlap (decision D5).
    """
    block_start, block_end = block * block_size, (block + 1) * block_size
    # Window c reaches the block if c*s + l > block_start, and does not lie after it if
    # c*s < block_end; `first` is the least c of the former, `end` the least that fails the latter.
    first = (block_start - kernel_size) // kernel_stride + 1
    end = -(-block_end // kernel_stride)
    return max(first, 0), end


def paper_eq7_windows(
    block: int, block_size: int, kernel_size: int, kernel_stride: int
) -> tuple[int, int]:
    """Return the half-open range of window indices that Eq. 7 names literally.

    It begins at the block's first token and is as long as the overlap range of an inner block, so
    it drops the window that reaches into the block and takes one that lies after it (decision D5).

    >>> paper_eq7_windows(2, block_size=64, kernel_size=32, kernel_stride=16)
    (8, 13)
    """
    first = block * block_size // kernel_stride
    return first, first + (block_size + kernel_size) // kernel_stride - 1


def is_forced(
    block: int, position: int, block_size: int, init_blocks: int, local_blocks: int
) -> bool:
    """Say whether the query at `position` attends `block` whatever its score.

    Forced are the visible initial blocks and the `local_blocks` that end at the query's own.

    >>> [b for b in range(8) if is_forced(b, 400, block_size=64, init_blocks=1, local_blocks=3)]
    [0, 4, 5, 6]

    Source: Eq. 2-3 (decision D6).
    """
    own = position // block_size
    return block <= own and (block < init_blocks or block > own - local_blocks)


def num_forced(position: int, block_size: int, init_blocks: int, local_blocks: int) -> int:
    """Count the forced blocks of the query at `position`.

    >>> [num_forced(p, 64, init_blocks=1, local_blocks=3) for p in (0, 64, 128, 192, 400)]
    [1, 2, 3, 4, 4]
    """
    return min(position // block_size + 1, init_blocks + local_blocks)


def num_selected(
    position: int, block_size: int, init_blocks: int, local_blocks: int, budget: int
) -> int:
    """Count the blocks that the query at `position` selects: the budget, or all visible if fewer.

    >>> [num_selected(p, 64, init_blocks=1, local_blocks=3, budget=5) for p in (0, 255, 256, 9999)]
    [1, 4, 5, 5]
    """
    assert budget >= init_blocks + local_blocks
    return min(position // block_size + 1, budget)


def first_position(num_queries: int, num_keys: int) -> int:
    """Return the position of the first query: the queries are the last of the keys' tokens.

    >>> first_position(num_queries=3, num_keys=10)
    7
    """
    assert 0 <= num_queries <= num_keys
    return num_keys - num_queries
