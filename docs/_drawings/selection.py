"""Selections of a real run."""

from __future__ import annotations

from itertools import groupby

import torch
from matplotlib.figure import Figure

from infllmv2_reference.geometry import is_forced

from .example import Run, map_run
from .style import BLUE, FAINT, INK, ORANGE, PURPLE, SKY, SOFT, canvas, key, seamless

ROWS = 6  # queries of one row of the map


def selection_map() -> Figure:
    """Draw which blocks every sixth query selects, and why."""
    run = map_run()
    figure, (axes,) = canvas(4.4)
    size, blocks = run.config.block_size, run.num_keys // run.config.block_size
    positions = range(ROWS - 1, run.num_keys, ROWS)
    for block in range(blocks):
        column = [_colour(run, position, block) for position in positions]
        for colour, rows in groupby(range(len(column)), key=lambda row: column[row]):
            top, *rest = rows
            if colour:
                seamless(axes, block, top * ROWS, 1, (1 + len(rest)) * ROWS, colour)
    axes.set(xlim=(0, blocks), ylim=(run.num_keys, 0), xlabel="block", ylabel="query position")
    axes.set_xticks(range(0, blocks + 1, 8))
    axes.set_yticks(range(0, run.num_keys + 1, size * 8))
    key(axes, {"initial": PURPLE, "local": SKY, "best-scored": ORANGE, "not selected": FAINT})
    return figure


def _colour(run: Run, position: int, block: int) -> str | None:
    """Say what a block is to a query; a block after its own is nothing."""
    c = run.config
    if block > position // c.block_size:
        return None
    if is_forced(block, position, c.block_size, c.init_blocks, c.local_blocks):
        return PURPLE if block < c.init_blocks else SKY
    return ORANGE if block in run.selected[position] else FAINT


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
