"""Scores of blocks on Hopper GPUs: the host's side of `score_hopper.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Lines, Windows
from infllmv2_reference.config import SparseConfig

from .attend import Kernels, multiprocessors
from .attend_hopper import tensor_map
from .launch import Kernel, capability, launch
from .lse import LOG2_E
from .score import can_pool, competing_are_visible

GROUPS = (8, 16, 32)
HEAD_DIMS = (64, 128)
WARP_GROUPS = 3
THREADS = 128 * (WARP_GROUPS + 1)
_COLUMNS = 128 * WARP_GROUPS
"""Queries of a block of threads, one for each head: 128 for each group of warps."""
_TILE = 64
_PART = 16
"""Windows of a tile, and those of a warp."""


def tokens_of_tile(group: int) -> int:
    """Return the query tokens of a block of threads."""
    return _COLUMNS // group


def takes(q: Tensor, windows: Windows, config: SparseConfig, kernels: Kernels) -> bool:
    """Say whether the kernel is to score blocks for queries `[total_q, HQ, D]`.

    The loop over windows is not spread over blocks of threads: with few queries others are faster.
    """
    group = q.shape[1] // windows.means.shape[1]
    per = config.block_size // config.kernel_stride
    if (
        kernels == "portable"
        or not suits(q, windows)
        or not can_pool(config, _TILE)
        or not 2 <= per <= _PART
    ):
        return False
    tiles = len(q) // tokens_of_tile(group) * windows.means.shape[1]
    return kernels == "hopper" or tiles >= multiprocessors(q.device)


def suits(q: Tensor, windows: Windows) -> bool:
    """Say whether there are kernels of Hopper GPUs for these queries and windows."""
    return (
        capability(q.device) == (9, 0)
        and len(q) > 0
        and len(windows.means) > 0
        and q.shape[2] in HEAD_DIMS
        and q.shape[1] // windows.means.shape[1] in GROUPS
    )


def write_blocks(
    q: Tensor,
    windows: Windows,
    lse: Tensor,
    lengths: Lengths,
    config: SparseConfig,
    lines: Lines,
    *,
    covered: int = 0,
    dense_len: int = -1,
) -> None:
    """Write scores of the blocks that compete into `lines`.

    Args:
        q: queries `[total_q, HQ, D]`, `aligned` to 8 channels.
        windows: those of K_C1, `aligned` to 8 channels.
        lse: from `window_lse`.
        lengths: of the batch.
        config: blocks, local blocks.
        lines: where; contiguous, with slots of `tokens_of_tile`.
        covered: rows with at most so many visible blocks may stay unwritten: they select them all.
        dense_len: rows of sequences of fewer keys may stay unwritten.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    launch(
        kernel(q.dtype, group, head_dim, config, by_slot=lines.by_slot),
        (min(lines.slots * num_kv_heads, multiprocessors(q.device)), 1, 1),
        THREADS,
        shared_bytes(group, head_dim),
        q,
        tensor_map(q.transpose(0, 1), (group, min(128 // group, 8))),
        tensor_map(windows.means, (_PART, 1)),
        lse,
        lines.data,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        total_q,
        lines.slots,
        num_kv_heads,
        dense_len,
        covered,
        config.local_blocks,
        lines.first_slot,
        lines.data.shape[1],
        lines.data.shape[2],
        lse.shape[0],
        LOG2_E * head_dim**-0.5,
    )


def kernel(
    dtype: torch.dtype, group: int, head_dim: int, config: SparseConfig, *, by_slot: bool
) -> Kernel:
    """Return the kernel for these sizes."""
    defines = {
        "BF16": int(dtype == torch.bfloat16),
        "GROUP": group,
        "D": head_dim,
        "SIZE": config.kernel_size,
        "STRIDE": config.kernel_stride,
        "BLOCK": config.block_size,
        "ALL_VISIBLE": int(competing_are_visible(config)),
        "BY_SLOT": int(by_slot),
        "STAGES": stages(group, head_dim),
    }
    return Kernel("score_hopper.cu", "score_hopper", tuple(defines.items()), hopper=True)


def stages(group: int, head_dim: int) -> int:
    """Return how many tiles of windows are in shared memory."""
    return 12 if head_dim == 64 else 5 if group == 8 else 6


def shared_bytes(group: int, head_dim: int) -> int:
    """Return the shared memory of a block of threads, as `Shared` of the kernel has it."""
    tokens, tiles = 128 // group, stages(group, head_dim)
    operands = 2 * (_COLUMNS + tiles * _TILE) * head_dim
    warps = 4 * WARP_GROUPS
    sums = 4 * warps * tokens * (2 * _PART + 4)
    others = 4 * (_COLUMNS + warps * tokens) + 8 * 2 * (WARP_GROUPS + tiles)
    return -(-(operands + sums + others) // 1024) * 1024
