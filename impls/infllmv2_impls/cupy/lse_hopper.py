"""The normaliser of stage 2 on Hopper GPUs: the host's side of `lse_hopper.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_impls.packing import Lengths, Windows, num_slots

from .attend import Kernels, multiprocessors
from .attend_hopper import tensor_map
from .launch import Kernel, launch
from .lse import LOG2_E
from .score_hopper import suits

THREADS = 384
STAGES = {64: 6, 128: 3}
"""Tiles of windows in shared memory, by head dim."""
_ROWS = 256
"""Queries of a tile, one for each head."""
_WINDOWS = 128
_BUFFERS = 2


def takes(q: Tensor, windows: Windows, kernels: Kernels) -> bool:
    """Say whether the kernel is to take queries `[total_q, HQ, D]`; with few, others are faster."""
    if kernels == "portable" or not suits(q, windows):
        return False
    tiles = len(q) * q.shape[1] // _ROWS
    return kernels == "hopper" or tiles >= multiprocessors(q.device)


def window_lse(
    q: Tensor,
    windows: Windows,
    lengths: Lengths,
    block_size: int,
    covered: int = 0,
    dense_len: int = -1,
) -> Tensor:
    """Return the LSE to the base 2 over visible windows, as `window_lse` of `lse.py`, in one part.

    Queries have to be `aligned` to 8 channels.
    """
    (total_q, num_heads, head_dim), num_kv_heads = q.shape, windows.means.shape[1]
    group = num_heads // num_kv_heads
    tokens = _ROWS // group
    slots = num_slots(total_q, lengths.batch, tokens)
    lse = torch.empty((1, total_q, num_heads), dtype=torch.float32, device=q.device)
    launch(
        kernel(q.dtype, group, head_dim, windows, block_size),
        (min(slots * num_kv_heads, multiprocessors(q.device)), 1, 1),
        THREADS,
        shared_bytes(head_dim),
        q,
        tensor_map(q, (tokens, group)),
        tensor_map(windows.means, (_WINDOWS, 1)),
        lse,
        lengths.ends_q,
        lengths.ends_k,
        windows.starts,
        lengths.batch,
        slots,
        num_kv_heads,
        dense_len,
        covered,
        LOG2_E * head_dim**-0.5,
    )
    return lse


def kernel(
    dtype: torch.dtype, group: int, head_dim: int, windows: Windows, block_size: int
) -> Kernel:
    """Return the kernel for these sizes."""
    defines = {
        "BF16": int(dtype == torch.bfloat16),
        "GROUP": group,
        "D": head_dim,
        "SIZE": windows.size,
        "STRIDE": windows.stride,
        "BLOCK": block_size,
        "STAGES": STAGES[head_dim],
    }
    return Kernel("lse_hopper.cu", "lse_hopper", tuple(defines.items()), hopper=True)


def shared_bytes(head_dim: int) -> int:
    """Return the shared memory of a block of threads: queries, windows, and their barriers."""
    stages = STAGES[head_dim]
    return 2 * (_BUFFERS * _ROWS + stages * _WINDOWS) * head_dim + 1024
