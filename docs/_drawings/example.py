"""The small runs that drawings show: inputs with a stated model, through the reference's stages."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from infllmv2_reference import (
    SparseConfig,
    compress_for_selection,
    pool_blocks,
    score_windows,
    select_blocks,
)


class Run(NamedTuple):
    """Hold one run of stages 1 to 4, with a single key/value head.

    Args:
        config: its parameters.
        num_keys: S.
        scores: of windows, `[T, C]`.
        block_scores: of blocks, `[T, N]`.
        selected: block indices, then -1, `[T, K]`.
    """

    config: SparseConfig
    num_keys: int
    scores: Tensor
    block_scores: Tensor
    selected: Tensor


def run_stages(q: Tensor, k: Tensor, config: SparseConfig) -> Run:
    """Run stages 1 to 4 for one key/value head."""
    k_c1, k_c2 = compress_for_selection(k, config)
    scores = score_windows(q, k_c1, k_c2, len(k), config)
    block_scores = pool_blocks(scores, len(k), config)
    selected = select_blocks(block_scores, len(k), config)
    return Run(config, len(k), scores[0], block_scores[0], selected[0])


@cache
def walk_run() -> Run:
    """Run one query over 64 tokens; two stretches of keys point its way."""
    config = SparseConfig(
        block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=4, dense_len=-1
    )
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(64, 1, 16, generator=generator)
    direction = torch.randn(16, generator=generator)
    k[21:25, 0] += 0.8 * direction
    k[35:37, 0] += 0.9 * direction
    q = (1.2 * direction + 0.5 * torch.randn(1, 2, 16, generator=generator)).reshape(1, 2, 16)
    return run_stages(q, k, config)


@cache
def map_run() -> Run:
    """Run 768 queries over 768 tokens: topics that last a while and come back.

    A key is its topic's direction plus noise; a query looks for the topic of its token. There are
    6 topics, each lasts 32 tokens, and which one comes next is drawn at random.
    """
    config = SparseConfig(
        block_size=16, kernel_size=8, kernel_stride=4, window_size=48, topk=9, dense_len=-1
    )
    generator = torch.Generator().manual_seed(11)
    topics = torch.randn(6, 32, generator=generator)
    order = torch.randint(6, (768 // 32,), generator=generator).repeat_interleave(32)
    noise = torch.randn(2, 768, 32, generator=generator)
    k = (topics[order] + 1.5 * noise[0])[:, None]
    q = (topics[order] + 0.7 * noise[1])[:, None].repeat(1, 2, 1)
    return run_stages(q, k, config)
