"""Sizes of tiles, warps and stages of the selection: a fixed choice for each class of shapes.

A class is what a model fixes: head dim, group, and geometry of windows and blocks. Lengths enter
only as "a few queries", and as powers of two of the most blocks, so that hardly a new length
compiles anything.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCKS_OF_THREADS = 264
"""Enough to fill a device: two for each multiprocessor of an H100."""
STEPS_OF_A_PART = 2
"""The fewest steps for which a block of threads is worth while."""
WINDOWS = 64
"""Windows of one step of the loops over them."""


@dataclass(frozen=True)
class TopkTile:
    """Size the work of one block of threads of the selection.

    Args:
        held: scores that each lane keeps in registers.
        warps: warps of one row.
        rows: rows of a block of threads.
    """

    held: int
    warps: int
    rows: int


def topk_tile(blocks: int) -> TopkTile:
    """Choose the tile of the selection, for rows of at most so many blocks.

    Rows that do not fit into the registers of 8 warps are read from memory again and again.
    """
    warps = 1
    while warps < 8 and warps * 2048 < blocks:
        warps *= 2
    held = 4
    while held < 64 and warps * 32 * held < blocks:
        held *= 2
    return TopkTile(held, warps, 4 if warps == 1 else 1)


def stage_tile(max_seqlen_q: int) -> int:
    """Choose the tokens of a slot for stages that work on stored scores."""
    return 8 if max_seqlen_q > 1 else 1


def num_parts(others: int, steps: int) -> int:
    """Choose over how many blocks of threads the loop of one is spread: enough to fill the device.

    Args:
        others: how many blocks of threads there are otherwise.
        steps: the most steps of a loop.
    """
    return max(min(BLOCKS_OF_THREADS // max(others, 1), steps // STEPS_OF_A_PART), 1)
