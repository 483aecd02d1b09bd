"""What does a sliding window lose with w/B local blocks? Counted, position by position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import is_forced

FULL = {"positions": 8192, "local_blocks": [31, 32, 33]}
SMALL = {"positions": 2304, "local_blocks": [32, 33]}


def run(positions: int, local_blocks: list[int]) -> dict[str, Any]:
    """Return what is lost of the window, over all positions and by offset in the block."""
    return {f"local_{count}": _count(positions, count) for count in local_blocks}


def _count(positions: int, local_blocks: int) -> dict[str, Any]:
    config = replace(SparseConfig.minicpm4(), local_override=local_blocks)
    size, w = config.block_size, config.window_size
    lost = [_lost(position, config) for position in range(positions)]
    full = lost[w + config.init_blocks * size :]  # the window is full and clear of initial blocks
    by_offset = [set(full[offset::size]) for offset in range(size)]
    assert all(len(values) == 1 for values in by_offset)
    return {
        "scored_blocks": config.budget - config.init_blocks - local_blocks,
        "first_position_with_loss": next((p for p, n in enumerate(lost) if n), None),
        "positions_with_loss": sum(n > 0 for n in full) / len(full),
        "mean_lost": sum(full) / len(full),
        "mean_part_lost": sum(full) / len(full) / w,
        "most_lost": max(full),
        "by_offset": [values.pop() for values in by_offset],
    }


def _lost(position: int, c: SparseConfig) -> int:
    """Count the tokens of the window that lie in no forced block."""
    size, first = c.block_size, max(0, position - c.window_size + 1)
    lost = 0
    for block in range(first // size, position // size + 1):
        if not is_forced(block, position, size, c.init_blocks, c.local_blocks):
            lost += min(position + 1, (block + 1) * size) - max(first, block * size)
    return lost
