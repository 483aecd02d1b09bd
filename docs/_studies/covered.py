"""Which part of the context does a pattern cover, by budget and by tile of queries?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data import background, generator
from infllmv2_reference import SparseConfig, compress_for_selection, select_by_windows
from infllmv2_reference.geometry import num_blocks, num_forced, num_selected

GROUP, DIM, TOPIC = 8, 32, 64
CONFIG = replace(SparseConfig.minicpm4(), dense_len=-1)
FULL = {
    "contexts": [4096, 8192, 16384, 32768, 65536, 131072],
    "budgets": [48, 64, 96, 128, 192],
    "tiles": [1, 2, 4, 8, 16, 32, 64, 128],
    "alike": [0.0, 0.5, 0.9, 0.99],
    "trials": 4,
}
SMALL = {"contexts": [8192], "budgets": [96], "tiles": [1, 8], "alike": [0.0, 0.9], "trials": 1}


def run(
    contexts: list[int], budgets: list[int], tiles: list[int], alike: list[float], trials: int
) -> dict[str, Any]:
    """Return the part of the context that one query covers, and that tiles of queries need."""
    one = {k: {s: _covered(s, k) for s in contexts} for k in budgets}
    parts = {s: _parts(s) for s in contexts}
    union = {
        f"alike_{a:g}".replace(".", "_"): {s: _unions(s, tiles, a, trials) for s in contexts}
        for a in alike
    }
    return {"one_query": one, "parts": parts, "union": union}


def _covered(num_keys: int, budget: int) -> float:
    """Return the mean part of its visible tokens that a query attends, over the last block's."""
    size, c = CONFIG.block_size, CONFIG
    parts = []
    for position in range(num_keys - size, num_keys):
        blocks = num_selected(position, size, c.init_blocks, c.local_blocks, budget)
        parts.append(((blocks - 1) * size + position % size + 1) / (position + 1))
    return sum(parts) / len(parts)


def _parts(num_keys: int) -> dict[str, int]:
    """Count the blocks of the last query by kind."""
    c, position = CONFIG, num_keys - 1
    forced = num_forced(position, c.block_size, c.init_blocks, c.local_blocks)
    selected = num_selected(position, c.block_size, c.init_blocks, c.local_blocks, c.budget)
    visible = num_blocks(num_keys, c.block_size)
    return {"forced": forced, "scored": selected - forced, "left_out": visible - selected}


def _unions(num_keys: int, tiles: list[int], alike: float, trials: int) -> dict[str, Any]:
    """Return the mean number of blocks that tiles of the last queries need together."""
    random = generator("coverage", num_keys, alike, trials)
    rows, sums = max(tiles), dict.fromkeys(tiles, 0.0)
    for _ in range(trials):
        keys = background(random, num_keys, 1, DIM, 0.25)
        q = _queries(random, rows, alike)
        windows = compress_for_selection(keys, CONFIG)
        selected = select_by_windows(q, *windows, num_keys, CONFIG)[0]  # [T, K]
        for tile in tiles:
            parts = selected.split(tile)
            sizes = [len(part[part >= 0].unique()) for part in parts]
            sums[tile] += sum(sizes) / len(sizes) / trials
    blocks = num_blocks(num_keys, CONFIG.block_size)
    return {"blocks": sums, "part": {tile: size / blocks for tile, size in sums.items()}}


def _queries(random: torch.Generator, rows: int, alike: float) -> Tensor:
    """Return queries `[T, G, D]`; a share `alike` of their variance is common to 64 neighbours."""
    own = torch.randn(rows, GROUP, DIM, generator=random)
    topic = torch.randn(-(-rows // TOPIC), GROUP, DIM, generator=random)
    topic = topic.repeat_interleave(TOPIC, dim=0)[:rows]
    return (1 - alike) ** 0.5 * own + alike**0.5 * topic
