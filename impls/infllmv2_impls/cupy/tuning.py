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


@dataclass(frozen=True)
class ScoreTile:
    """Size the work of one block of threads of the scores.

    Args:
        heads: heads of one warp, a power of two.
        token_groups: groups of 8 tokens; each has the warps that all heads need.
        windows: of one step of the loop.
        row_tiles: how many times 16 windows a warp has logits of in registers.
        stages: tiles of windows in shared memory.
        threads: of the block.
        resident: how many blocks must fit a multiprocessor, which limits registers.
        shared_bytes: shared memory of the block.
    """

    heads: int
    token_groups: int
    windows: int
    row_tiles: int
    stages: int
    threads: int
    resident: int
    shared_bytes: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one block of threads."""
        return 8 * self.token_groups


def score_tile(head_dim: int, group: int, max_seqlen_q: int) -> ScoreTile:
    """Choose the tile of the scores: 8 warps, whose queries fill half of their registers."""
    padded = padded_group(group)
    heads = min(padded, 4 if head_dim <= 128 else 2)
    splits = padded // heads
    is_few = max_seqlen_q <= 8
    token_groups = 1 if is_few else max(8 // splits, 1)
    warps = splits * token_groups
    resident = 1 if is_few else max(16 // warps, 1)
    windows = _windows(head_dim)
    sums = 4 * warps * 8 * (windows + 4)
    shared = 2 * _tile_bytes(head_dim) + 2 * sums
    return ScoreTile(heads, token_groups, windows, 2, 2, 32 * warps, resident, shared)


@dataclass(frozen=True)
class LseTile:
    """Size the work of one block of threads of the normaliser.

    Args:
        tokens: query tokens, each with all heads of a group.
        windows: of one step of the loop.
        row_tiles: how many times 16 rows, of a token and a head each, a warp has.
        warps: of the block.
        stages: tiles of windows in shared memory.
        resident: how many blocks must fit a multiprocessor, which limits registers.
        shared_bytes: shared memory of the block.
    """

    tokens: int
    windows: int
    row_tiles: int
    warps: int
    stages: int
    resident: int
    shared_bytes: int


def lse_tile(head_dim: int, group: int, max_seqlen_q: int) -> LseTile:
    """Choose the tile of the normaliser: 4 warps, whose queries fill half of their registers."""
    padded = padded_group(group)
    few = max(16 // padded, 1)
    windows = _windows(head_dim)
    if max_seqlen_q <= few:
        stages = 3  # few warps have nothing else to hide latencies with
        warps = few * padded // 16
        return LseTile(few, windows, 1, warps, stages, 1, stages * _tile_bytes(head_dim))
    row_tiles = 2 if head_dim <= 128 else 1
    tokens = 64 * row_tiles // padded
    return LseTile(tokens, windows, row_tiles, 4, 2, 3, 2 * _tile_bytes(head_dim))


def padded_group(group: int) -> int:
    """Return the heads that a tile has for a group: a power of two."""
    return 1 << (group - 1).bit_length()


def _windows(head_dim: int) -> int:
    """Return the windows of a tile, few enough for the shared memory of small devices."""
    return 64 if head_dim <= 128 else 32


def _tile_bytes(head_dim: int) -> int:
    return 2 * _windows(head_dim) * (head_dim + 8)  # rows are padded by 8 halves


@dataclass(frozen=True)
class TopkTile:
    """Size the work of one block of threads of the selection.

    Args:
        warps: warps of one row.
        rows: rows of a block of threads.
    """

    warps: int
    rows: int


def topk_tile(blocks: int, rows: int) -> TopkTile:
    """Choose the tile of the selection: one warp a row, unless a few long rows leave most idle.

    Args:
        blocks: the most of a row.
        rows: of all heads and tokens.
    """
    is_few = rows <= 2 * BLOCKS_OF_THREADS and blocks > 1024
    return TopkTile(8, 1) if is_few else TopkTile(1, 4)


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
