"""Compute what single stages are given: windows, scores and a selection, fast at any length.

They are arguments, not oracles: a stage is judged by what it was given. They need the right form
and realistic numbers, so products are taken in the dtype of the inputs, on matrix units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows

_CHUNK_ELEMENTS = 1 << 26


def compress(k: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """Return the windows of one sequence's keys, `[C, HK, D]`."""
    count = num_windows(len(k), kernel_size, kernel_stride)
    windows = k.new_empty(count, *k.shape[1:])
    if count:
        for head in range(k.shape[1]):  # one at a time: float32 takes twice the memory
            spans = k[:, head].float().unfold(0, kernel_size, kernel_stride)
            windows[:, head] = spans.mean(-1).to(k.dtype)
    return windows


def window_scores(q: Tensor, k_c1: Tensor, k_c2: Tensor, config: SparseConfig) -> Tensor:
    """Return scores of one prefilled sequence, float32 `[HK, T, C]`, -inf where invisible."""
    result = torch.empty(k_c1.shape[1], len(q), len(k_c1), device=q.device)

    def keep(head: int, rows: slice, scores: Tensor) -> None:
        result[head, rows] = scores

    _for_rows(q, k_c1, k_c2, config, keep)
    return result


def block_scores(q: Tensor, k_c1: Tensor, k_c2: Tensor, config: SparseConfig) -> Tensor:
    """Return scores of blocks, float32 `[HK, T, N]`, -inf where no window is visible."""
    blocks = num_blocks(len(q), config.block_size)
    result = torch.empty(k_c1.shape[1], len(q), blocks, device=q.device)

    def keep(head: int, rows: slice, scores: Tensor) -> None:
        result[head, rows] = _pool(scores, blocks, config)

    _for_rows(q, k_c1, k_c2, config, keep)
    return result


def selection(q: Tensor, k_c1: Tensor, k_c2: Tensor, config: SparseConfig) -> Tensor:
    """Return the best-scored blocks beside the forced ones, int32 `[HK, T, K]`."""
    blocks = num_blocks(len(q), config.block_size)
    shape = k_c1.shape[1], len(q), config.budget
    result = torch.empty(shape, dtype=torch.int32, device=q.device)

    def keep(head: int, rows: slice, scores: Tensor) -> None:
        result[head, rows] = _select(_pool(scores, blocks, config), rows, config)

    _for_rows(q, k_c1, k_c2, config, keep)
    return result


def _for_rows(
    q: Tensor,
    k_c1: Tensor,
    k_c2: Tensor,
    config: SparseConfig,
    keep: Callable[[int, slice, Tensor], None],
) -> None:
    """Score chunks of queries, and hand each to `keep` with its kv head and rows, `[t, C]`."""
    heads = k_c1.shape[1]
    group = q.shape[1] // heads
    step = max(1, _CHUNK_ELEMENTS // max(1, group * len(k_c1)))
    for start in range(0, len(q), step):
        rows = slice(start, min(start + step, len(q)))
        for head in range(heads):
            queries = q[rows, head * group : (head + 1) * group]
            keep(head, rows, _score(queries, k_c1[:, head], k_c2[:, head], start, config))


def _score(q: Tensor, k_c1: Tensor, k_c2: Tensor, start: int, config: SparseConfig) -> Tensor:
    """Return the scores of windows for queries `[t, G, D]` from position `start` on, `[t, C]`."""
    scale = q.shape[-1] ** -0.5
    positions = torch.arange(start, start + len(q), device=q.device)[:, None] + 1

    def hidden(windows: Tensor, size: int, stride: int) -> Tensor:
        ends = torch.arange(len(windows), device=q.device) * stride + size
        return ends > positions  # [t, C]

    mask = hidden(k_c2, config.lse_kernel_size, config.lse_kernel_stride)
    logits = (q @ k_c2.mT).float().mul_(scale).masked_fill_(mask[:, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)  # [t, G, 1]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    scores = (q @ k_c1.mT).float().mul_(scale).sub_(lse).exp_().sum(1)
    mask = hidden(k_c1, config.kernel_size, config.kernel_stride)
    return scores.masked_fill_(mask, -torch.inf)


def _pool(scores: Tensor, blocks: int, config: SparseConfig) -> Tensor:
    """Return the highest score that overlaps each block, `[t, N]`; strides divide the block."""
    step = config.block_size // config.kernel_stride
    before = config.kernel_size // config.kernel_stride - 1
    width = blocks * step + before
    padded = scores.new_full((len(scores), width), -torch.inf)
    padded[:, before : before + scores.shape[1]] = scores
    return padded.unfold(1, step + before, step).amax(-1)


def _select(scores: Tensor, rows: slice, config: SparseConfig) -> Tensor:
    """Return the blocks of highest score `[t, K]`, the forced ones first of all."""
    blocks = torch.arange(scores.shape[1], device=scores.device)
    own = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] // config.block_size
    forced = (blocks < config.init_blocks) | (blocks > own - config.local_blocks)
    ranks = scores.clamp(min=0.0).masked_fill(forced, torch.inf)  # unseen ones compete as 0
    ranks = ranks.masked_fill(blocks > own, -torch.inf)
    count = min(config.budget, len(blocks))
    best = ranks.topk(count, dim=1)
    ids = best.indices.where(best.values > -torch.inf, len(blocks)).sort(1).values
    result = ids.new_full((len(ids), config.budget), -1)
    result[:, :count] = ids.where(ids < len(blocks), -1)
    return result.int()
