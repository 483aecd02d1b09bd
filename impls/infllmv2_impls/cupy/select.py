"""Stages 2 to 4 put together: scores in scratch memory of a bounded size, then the selection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines, Windows, num_slots
from infllmv2_reference.config import SparseConfig

from . import lse_hopper, score_hopper
from .attend import Kernels
from .lse import window_lse
from .pool import pool_scores
from .score import can_pool, write_scores
from .topk import write_selection
from .tuning import ScoreTile, score_tile, stage_tile

SCRATCH_BYTES = 1 << 30
"""The most memory for scores, unless one slot needs more: queries are selected for in chunks."""
COLUMNS = 64
"""Lines of scores are padded to a multiple of this, the most blocks of one step."""


@dataclass(frozen=True)
class _Plan:
    """Say which kernel scores.

    Args:
        tile: of the kernel for every GPU; None for that of Hopper GPUs.
        tokens: of a slot.
        is_pooled: whether it scores blocks, and not windows.
    """

    tile: ScoreTile | None
    tokens: int
    is_pooled: bool


def score_windows(
    q: Tensor,
    c1: Windows,
    c2: Windows,
    lengths: Lengths,
    config: SparseConfig,
    kernels: Kernels = "auto",
) -> Tensor:
    """Return the scores of windows, float32 `[HK, total_q, C]`."""
    q, c1 = _aligned(q, c1, kernels)
    tile = _tile(q, c1, lengths)
    windows = lengths.most_windows(config)
    scores = _packed(q, c1.means.shape[1], windows, tile.tokens, lengths)
    lse = _normaliser(q, c1, c2, lengths, config, kernels)
    write_scores(q, c1, lse, lengths, config, tile, scores, pooled=False)
    return scores.data


def score_blocks(
    q: Tensor,
    c1: Windows,
    c2: Windows,
    lengths: Lengths,
    config: SparseConfig,
    kernels: Kernels = "auto",
) -> Tensor:
    """Return the scores of the blocks that compete, float32 `[HK, total_q, N]`."""
    q, c1 = _aligned(q, c1, kernels)
    plan = _plan(q, c1, lengths, config, kernels)
    pooled = _packed(q, c1.means.shape[1], lengths.most_blocks(config), plan.tokens, lengths)
    if plan.is_pooled:
        lse = _normaliser(q, c1, c2, lengths, config, kernels)
        _write(plan, q, c1, lse, lengths, config, pooled)
    else:
        scores = score_windows(q, c1, c2, lengths, config, kernels)
        pool_scores(Lines(scores, plan.tokens, pooled.slots), pooled, lengths, config)
    return pooled.data


def pool_blocks(scores: Tensor, lengths: Lengths, config: SparseConfig) -> Tensor:
    """Pool scores `[HK, total_q, C]` into blocks, `[HK, total_q, N]`; -inf behind the query's."""
    tile = stage_tile(lengths.max_seqlen_q)
    num_heads, total_q, _ = scores.shape
    slots = num_slots(total_q, lengths.batch, tile)
    shape = (num_heads, total_q, lengths.most_blocks(config))
    pooled = torch.full(shape, -torch.inf, dtype=torch.float32, device=scores.device)
    pool_scores(Lines(scores, tile, slots), Lines(pooled, tile, slots), lengths, config)
    return pooled


def select_blocks(block_scores: Tensor, lengths: Lengths, config: SparseConfig) -> Tensor:
    """Select by the scores of blocks `[HK, total_q, N]`: int32 `[HK, total_q, K]`."""
    tile = stage_tile(lengths.max_seqlen_q)
    num_heads, total_q, _ = block_scores.shape
    lines = Lines(block_scores, tile, num_slots(total_q, lengths.batch, tile))
    selected = _unwritten(num_heads, total_q, config, block_scores.device)
    write_selection(lines, selected, lengths, config)
    return selected


def select(
    q: Tensor,
    c1: Windows,
    c2: Windows,
    lengths: Lengths,
    config: SparseConfig,
    kernels: Kernels = "auto",
) -> Tensor:
    """Score, pool and select: int32 `[HK, total_q, K]`; -1 in sequences below `dense_len`."""
    q, c1 = _aligned(q, c1, kernels)
    num_heads, total_q = c1.means.shape[1], q.shape[0]
    selected = _unwritten(num_heads, total_q, config, q.device)
    plan = _plan(q, c1, lengths, config, kernels)
    blocks = padded(lengths.most_blocks(config))
    windows = 0 if plan.is_pooled else padded(lengths.most_windows(config))
    limits = {"covered": config.budget, "dense_len": config.dense_len}
    lse = _normaliser(q, c1, c2, lengths, config, kernels, **limits)
    slots = num_slots(total_q, lengths.batch, plan.tokens)
    line_bytes = 4 * num_heads * plan.tokens * (blocks + windows)
    step = min(max(SCRATCH_BYTES // max(line_bytes, 1), 1), slots)
    scratch = [
        torch.empty(step * num_heads * plan.tokens * columns, dtype=torch.float32, device=q.device)
        for columns in (blocks, windows)
    ]
    for first in range(0, slots, max(step, 1)):
        count = min(step, slots - first)
        pooled, scores = (
            _by_slot(x, num_heads, columns, plan.tokens, first, count)
            for x, columns in zip(scratch, (blocks, windows), strict=True)
        )
        _write(plan, q, c1, lse, lengths, config, pooled if plan.is_pooled else scores, **limits)
        if not plan.is_pooled:
            pool_scores(scores, pooled, lengths, config, config.dense_len)
        write_selection(pooled, selected, lengths, config, config.dense_len)
    return selected


def _plan(
    q: Tensor, c1: Windows, lengths: Lengths, config: SparseConfig, kernels: Kernels
) -> _Plan:
    if score_hopper.takes(q, c1, config, kernels):
        return _Plan(None, score_hopper.tokens_of_tile(q.shape[1] // c1.means.shape[1]), True)
    tile = _tile(q, c1, lengths)
    return _Plan(tile, tile.tokens, can_pool(config, tile.windows))


def _write(
    plan: _Plan,
    q: Tensor,
    c1: Windows,
    lse: Tensor,
    lengths: Lengths,
    config: SparseConfig,
    lines: Lines,
    covered: int = 0,
    dense_len: int = -1,
) -> None:
    limits = {"covered": covered, "dense_len": dense_len}
    if plan.tile is None:
        score_hopper.write_blocks(q, c1, lse, lengths, config, lines, **limits)
    else:
        pooled = plan.is_pooled
        write_scores(q, c1, lse, lengths, config, plan.tile, lines, pooled=pooled, **limits)


def aligned(x: Tensor, channels: int) -> Tensor:
    """Return `x`, copied unless its rows `[..., D]` can be loaded so many channels at a time.

    The last axis gets unit stride, and every row an address that is a multiple of that size.
    """
    strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    is_aligned = all(s % channels == 0 for s in strides)
    is_aligned = is_aligned and x.data_ptr() % (channels * x.element_size()) == 0
    if is_aligned and (x.shape[-1] <= 1 or x.stride(-1) == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _aligned(q: Tensor, c1: Windows, kernels: Kernels) -> tuple[Tensor, Windows]:
    by_copy_engine = kernels != "portable" and score_hopper.suits(q, c1)
    return aligned(q, 8 if by_copy_engine else 2), replace(c1, means=aligned(c1.means, 8))


def _by_slot(
    scratch: Tensor, num_heads: int, columns: int, tokens: int, first: int, count: int
) -> Lines:
    """Return lines for `count` slots from `first` on, in scratch memory."""
    shape = (num_heads, count * tokens, columns)
    data = scratch[: shape[0] * shape[1] * columns].view(shape)
    return Lines(data, tokens, count, first, by_slot=True)


def _normaliser(
    q: Tensor,
    c1: Windows,
    c2: Windows,
    lengths: Lengths,
    config: SparseConfig,
    kernels: Kernels,
    covered: int = 0,
    dense_len: int = -1,
) -> Tensor:
    windows = c1 if config.lse == "exact" else replace(c2, means=aligned(c2.means, 8))
    if lse_hopper.takes(q, windows, kernels):
        return lse_hopper.window_lse(q, windows, lengths, config.block_size, covered, dense_len)
    return window_lse(q, windows, lengths, config.block_size, covered, dense_len)


def _tile(q: Tensor, c1: Windows, lengths: Lengths) -> ScoreTile:
    return score_tile(q.shape[2], q.shape[1] // c1.means.shape[1], lengths.max_seqlen_q)


def _packed(q: Tensor, num_heads: int, columns: int, tokens: int, lengths: Lengths) -> Lines:
    """Return lines for all queries, as the contract wants them: -inf until written."""
    shape = (num_heads, q.shape[0], padded(columns))
    data = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    return Lines(data, tokens, num_slots(q.shape[0], lengths.batch, tokens))


def padded(columns: int) -> int:
    """Return how many columns lines of scores have for so many scores."""
    return -(-columns // COLUMNS) * COLUMNS


def _unwritten(num_heads: int, total_q: int, config: SparseConfig, device: torch.device) -> Tensor:
    shape = (num_heads, total_q, config.budget)
    return torch.empty(shape, dtype=torch.int32, device=device)
