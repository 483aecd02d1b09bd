"""Sizes of tiles, warps and stages: a fixed choice for each class of shapes, from measurements.

A class is what a model fixes: the dtype, the padded head dim and the padded group. Lengths enter
only as "a few queries", and as powers of two of the most blocks, so that hardly a new length
compiles anything. `docs/performance/notes.md` has the measurements. In the interpreter a program
costs much and an element little, so tiles are large there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from .device import INTERPRETED

PROGRAMS = 264
"""Enough to fill a device: two for each multiprocessor of an H100."""
STEPS_OF_A_PART = 2
"""The fewest steps for which a program is worth while."""


@dataclass(frozen=True)
class Tile:
    """Size the work of one program.

    Args:
        tokens: query tokens, each with all heads of a group.
        windows: windows of one step of the loop.
        warps: warps of a program.
        stages: depth of the pipeline that loads windows.
        step: channels that are multiplied at a time without tensor cores; 0 with them.
        registers: the most of a thread, so that more programs share a multiprocessor.
    """

    tokens: int
    windows: int
    warps: int
    stages: int
    step: int = 0
    registers: int | None = None


def padded_dim(head_dim: int) -> int:
    """Return the channels that a tile has for a head dim."""
    return max(triton.next_power_of_2(head_dim), 16)


def lse_tile(dtype: torch.dtype, head_dim: int, group: int, max_seqlen_q: int) -> Tile:
    """Choose the tile of the normaliser: about 128 rows of queries and heads."""
    pad = triton.next_power_of_2(group)
    if INTERPRETED:
        return Tile(_tokens(512, pad, max_seqlen_q), 64, 4, 1, _interpreted_step(dtype))
    if dtype == torch.float32:
        return Tile(_tokens(32, pad, max_seqlen_q), 32, 4, 1, step=32)
    is_wide = _is_wide(dtype, head_dim)
    return Tile(_tokens(128, pad, max_seqlen_q), 64, 4, 2, registers=None if is_wide else 168)


def score_tile(dtype: torch.dtype, head_dim: int, group: int, max_seqlen_q: int) -> Tile:
    """Choose the tile of the scores: up to 256 columns of queries and heads."""
    pad = triton.next_power_of_2(group)
    if INTERPRETED:
        return Tile(_tokens(1024, pad, max_seqlen_q), 64, 4, 1, _interpreted_step(dtype))
    if dtype == torch.float32:
        return Tile(_tokens(32, pad, max_seqlen_q), 32, 4, 1, step=32)
    if _is_wide(dtype, head_dim):
        return Tile(_tokens(128, pad, max_seqlen_q), 64, 4, 2)
    tokens = _tokens(256 if pad >= 4 else 128, pad, max_seqlen_q)
    return Tile(tokens, 64, 4, 3)


def _interpreted_step(dtype: torch.dtype) -> int:
    return 128 if dtype == torch.float32 else 0


def compress_tile(head_dim: int, kernel_size: int) -> tuple[int, int]:
    """Choose the windows of one program of the compression, and their tokens of one step."""
    at_once = min(triton.next_power_of_2(kernel_size), 16)
    if INTERPRETED:
        return 64, at_once
    return max(8192 // (at_once * padded_dim(head_dim)), 1), at_once


def append_tile() -> tuple[int, int]:
    """Choose rows and columns of one program that copies into a cache."""
    return (64, 1024) if INTERPRETED else (4, 1024)


@dataclass(frozen=True)
class TopkTile:
    """Size the work of one program of the selection.

    Args:
        rows: queries.
        width: blocks whose scores are held in registers.
        is_long: whether rows may have more blocks.
        chunk: blocks of one step of the scan.
        warps: warps of a program.
        registers: the most of a thread, so that more programs share a multiprocessor.
    """

    rows: int
    width: int
    is_long: bool
    chunk: int
    warps: int
    registers: int | None = None


def topk_tile(blocks: int, tokens: int) -> TopkTile:
    """Choose the tile of the selection, for rows of at most so many blocks.

    Args:
        blocks: the most blocks of a sequence.
        tokens: the rows of a program must divide this power of two.
    """
    width = max(triton.next_power_of_2(blocks), 64)
    if INTERPRETED:
        held = min(width, 128)  # so that long rows are tested there
        return TopkTile(min(tokens, 256), held, held < width, 64, 1)
    held = min(width, 16384)
    warps = max(held // 2048, 1)
    return TopkTile(1, held, held < width, min(256 * warps, held), warps, 96)


def stage_tile(max_seqlen_q: int) -> int:
    """Choose the tokens of a slot for stages that work on stored scores."""
    return min(256 if INTERPRETED else 8, triton.next_power_of_2(max(max_seqlen_q, 1)))


def pool_tile(tokens: int) -> tuple[int, int]:
    """Choose rows and blocks of one program of pooling; rows divide the power of two `tokens`."""
    return (min(tokens, 256), 64) if INTERPRETED else (min(tokens, 8), 64)


def num_parts(programs: int, steps: int) -> int:
    """Choose over how many programs the loop of one is spread: enough to fill the device.

    Args:
        programs: how many there are otherwise.
        steps: the most steps of a loop.
    """
    if INTERPRETED:
        return min(2, max(steps, 1)) if programs == 1 else 1  # so that parts are tested there
    return max(min(PROGRAMS // max(programs, 1), steps // STEPS_OF_A_PART), 1)


def _tokens(columns: int, group: int, max_seqlen_q: int) -> int:
    """Return the tokens that fill so many columns, fewer if no sequence has so many."""
    most = max(columns // group, 1)
    few = max(16 // group, 1)  # the least that the tensor core takes
    if max_seqlen_q <= few or most <= few:
        return few
    return most


def _is_wide(dtype: torch.dtype, head_dim: int) -> bool:
    return head_dim * dtype.itemsize > 256
