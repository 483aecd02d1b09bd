"""Selections of a real run."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from infllmv2_reference.geometry import is_forced

from .example import map_run
from .style import BLUE, FAINT, INK, ORANGE, PURPLE, SKY, SOFT, canvas, key, seamless

ROWS = 6  # queries of one row of the map


def selection_map() -> Figure:
    """Draw which blocks every sixth query selects, and why."""
    run = map_run()
    c = run.config
    figure, (axes,) = canvas(4.4)
    for position in range(ROWS - 1, run.num_keys, ROWS):
        seamless(axes, 0, position - ROWS + 1, position // c.block_size + 1, ROWS, FAINT)
        for block in (b for b in run.selected[position].tolist() if b >= 0):
            colour = ORANGE
            if is_forced(block, position, c.block_size, c.init_blocks, c.local_blocks):
                colour = PURPLE if block < c.init_blocks else SKY
            seamless(axes, block, position - ROWS + 1, 1, ROWS, colour)
    blocks = run.num_keys // c.block_size
    axes.set(xlim=(0, blocks), ylim=(run.num_keys, 0), xlabel="block", ylabel="query position")
    axes.set_xticks(range(0, blocks + 1, 8))
    axes.set_yticks(range(0, run.num_keys + 1, 128))
    key(axes, {"initial": PURPLE, "local": SKY, "best-scored": ORANGE, "not selected": FAINT})
    return figure


def neighbours() -> Figure:
    """Draw how many blocks a tile of neighbouring queries needs together."""
    run = map_run()
    figure, (axes,) = canvas(2.5)
    tiles = [1, 2, 4, 8, 16, 32, 64, 128]
    last = run.selected[run.num_keys // 2 :]  # rows that fill their budget
    together = [_union(last, tile) for tile in tiles]
    axes.plot(tiles, together, "o-", color=BLUE)
    axes.axhline(run.config.budget, color=SOFT, linestyle=":", linewidth=1.1)
    blocks = run.num_keys // run.config.block_size
    axes.axhline(blocks, color=SOFT, linestyle="--", linewidth=1.1)
    text = {"ha": "right", "va": "bottom", "fontsize": 8, "color": INK}
    axes.text(128, run.config.budget, f"budget of one query: {run.config.budget}", **text)
    axes.text(128, blocks, f"all blocks: {blocks}", **text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tiles, [str(tile) for tile in tiles])
    axes.set(ylim=(0, blocks * 1.12), xlabel="queries of a tile", ylabel="blocks in the union")
    axes.grid(axis="y")
    return figure


def _union(selected: torch.Tensor, tile: int) -> float:
    """Return the mean number of distinct blocks in tiles of consecutive rows."""
    sizes = [
        len(set(part.flatten().tolist()) - {-1})
        for part in selected.split(tile)
        if len(part) == tile
    ]
    return sum(sizes) / len(sizes)


ALL = (selection_map, neighbours)
