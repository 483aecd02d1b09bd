"""What a failure looks like, as small tables: errors by place, and blocks by query block.

Tables are made smaller by keeping the worst of what falls together, so that no fault is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import Span

from .failure import ConformanceFailure, Picture
from .margins import NOT_COMPARED
from .masks import forced_blocks, members, positions, visible_blocks

ROWS, COLUMNS = 48, 96
"""The largest table."""


def error_map(ratio: Tensor, axes: tuple[str, ...], span: Span) -> Picture:
    """Return the largest error over bound by head and place, or by query and place.

    Args:
        ratio: of one sequence, `NOT_COMPARED` where nothing is; never empty.
        axes: names of its axes.
        span: the sequence.
    """
    across = 2 if axes[0] == "kv head" else 0  # scores have their place last, the others first
    over = [axis for axis in range(ratio.ndim) if axis not in (1, across)]
    grid = ratio.amax(over) if over else ratio
    grid = grid if across else grid.T
    steps = [-(-size // most) for size, most in zip(grid.shape, (ROWS, COLUMNS), strict=True)]
    small = _shrink(grid, *steps)
    worst = divmod(int(small.argmax()), small.shape[1])
    return {
        "kind": "error map",
        "sequence": span.sequence,
        "rows": _axis(axes[1], grid.shape[0], steps[0], span),
        "columns": _axis(axes[across], grid.shape[1], steps[1], span),
        "over": [axes[axis] for axis in over],
        "worst": list(worst),
        "values": [[_number(x) for x in row] for row in small.tolist()],
    }


def selection_map(
    selected: Tensor, bad: Tensor, span: Span, config: SparseConfig, expected: Tensor | None = None
) -> Picture:
    """Return what was selected and what should have been, by query block and key block.

    Args:
        selected: the selection, `[HK, T, K]`.
        bad: rows that break the rule, `[HK, T]`; in others, differences are legal and not shown.
        span: the sequence.
        config: what is visible and forced.
        expected: the oracle's selection; without it only forced and future blocks are judged.
    """
    blocks = num_blocks(span.num_keys, config.block_size)
    visible, forced = visible_blocks(span, config), forced_blocks(span, config)
    chosen = members(selected.where(selected < blocks, -1), blocks)
    wanted = forced | (chosen & visible) if expected is None else members(expected.cpu(), blocks)
    wanted = wanted.where(bad[..., None], chosen)
    missed, extra, agreed = wanted & ~chosen, chosen & ~wanted, wanted & chosen
    layers = [visible, agreed & ~forced, agreed & forced, extra, missed & ~forced, missed & forced]
    own = positions(span) // config.block_size  # [T]
    cells, rows, columns = _by_block([x.any(0) if x.ndim == 3 else x for x in layers], own)
    kinds = torch.zeros(cells.shape[1:], dtype=torch.long)
    for kind, layer in enumerate((*cells, cells[3] & (cells[4] | cells[5])), 1):
        kinds = kinds.where(~layer, kind)
    wrong = _by_block([bad.any(0)[:, None]], own)[0][0]
    return {
        "kind": "selection map",
        "sequence": span.sequence,
        "block_size": config.block_size,
        "judged": "form" if expected is None else "selection",
        "rows": {"axis": "query block", "first": int(own[0]), **rows},
        "columns": {"axis": "key block", "first": 0, **columns},
        "wrong_rows": wrong.flatten().nonzero().flatten().tolist(),
        "cells": ["".join(" .sfxmFw"[kind] for kind in row) for row in kinds.tolist()],
    }


def attended_map(selected: Tensor, span: Span, config: SparseConfig) -> Picture:
    """Return the selection `[HK, T, K]` that an output was judged by, as `selection_map` does."""
    right = torch.zeros(selected.shape[:2], dtype=torch.bool)
    shown = selection_map(selected, right, span, config)
    return shown | {"kind": "attended blocks", "judged": "nothing"}


@contextmanager
def showing(draw: Callable[[], Picture]) -> Generator[None]:
    """Add a picture to a failure that is raised inside."""
    try:
        yield
    except ConformanceFailure as failure:
        failure.finding.pictures.append(draw)
        raise


def _by_block(layers: list[Tensor], own: Tensor) -> tuple[Tensor, dict[str, int], dict[str, int]]:
    """Gather `[T, N]` flags by query block, and make the table small: `[layers, rows, columns]`."""
    flags = torch.stack(layers)
    rows = int(own[-1] - own[0]) + 1
    gathered = torch.zeros(len(layers), rows, flags.shape[2])
    gathered.index_add_(1, own - own[0], flags.float())
    steps = -(-rows // COLUMNS), -(-flags.shape[2] // COLUMNS)
    small = torch.stack([_shrink(layer, *steps) for layer in gathered]) > 0
    row_axis = {"count": rows, "step": steps[0]}
    return small, row_axis, {"count": flags.shape[2], "step": steps[1]}


def _shrink(grid: Tensor, row_step: int, column_step: int) -> Tensor:
    """Keep the largest of every `row_step` rows and `column_step` columns."""
    below, right = -grid.shape[0] % row_step, -grid.shape[1] % column_step
    whole = pad(grid, (0, right, 0, below), value=NOT_COMPARED)
    rows, columns = whole.shape[0] // row_step, whole.shape[1] // column_step
    return whole.reshape(rows, row_step, columns, column_step).amax((1, 3))


def _axis(axis: str, count: int, step: int, span: Span) -> dict[str, Any]:
    if axis == "query":
        first = span.num_keys - span.num_queries
        return {"axis": "position", "first": first, "count": count, "step": step}
    return {"axis": axis, "first": 0, "count": count, "step": step}


def _number(ratio: float) -> float | None:
    """Return a ratio with three digits, None where nothing was compared."""
    return None if ratio == NOT_COMPARED else float(f"{ratio:.3g}")
