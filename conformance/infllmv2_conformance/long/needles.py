"""Where the needles of a case lie: in blocks that every late query must select."""

from __future__ import annotations

import torch

from infllmv2_conformance.cases import Case
from infllmv2_reference.geometry import num_blocks, overlapping_windows

MOST = 24
"""Needles of one sequence, at most, and at most half of the slots that are free."""


def needle_blocks(case: Case, sequence: int) -> list[int]:
    """Return the blocks that hold a needle, ascending.

    They compete for every query of the sequence. First come the corners: the first and the last
    such block, and powers of two with their neighbours below; the rest is drawn.
    """
    num_queries, num_keys = case.sequences[sequence]
    config = case.config
    first_own = (num_keys - num_queries) // config.block_size
    first = config.init_blocks
    last = first_own - config.local_blocks - _reach(case)
    if num_queries == num_keys:  # a prefill: for the later half of its rows
        last = num_blocks(num_keys, config.block_size) // 2 - config.local_blocks - _reach(case)
    count = min((config.budget - config.init_blocks - config.local_blocks) // 2, MOST)
    if last < first or count < 1:
        return []
    powers = [n for k in range(24, 6, -1) for n in (2**k, 2**k - 1)]
    corners = [n for n in (last, first, *powers) if first <= n <= last]
    generator = torch.Generator().manual_seed(case.seed * 31 + sequence)
    drawn = torch.randint(first, last + 1, (count,), generator=generator).tolist()
    chosen = dict.fromkeys([*corners[: count - count // 3], *drawn])
    return sorted(list(chosen)[:count])


def needle_windows(case: Case, sequence: int) -> list[int]:
    """Return the window of each needle: one that overlaps its block, in the middle if several."""
    c = case.config
    spans = [
        overlapping_windows(block, c.block_size, c.kernel_size, c.kernel_stride)
        for block in needle_blocks(case, sequence)
    ]
    return [(first + end - 1) // 2 for first, end in spans]


def _reach(case: Case) -> int:
    """Return how many blocks a window may reach over, so that all needles have ended in time."""
    return -(-case.kernel_size // case.block_size)
