"""Stage 1: means of windows of keys, and where the windows of every sequence lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_impls.packing import num_slots

from .launch import Kernel, launch
from .rows import int64, unit_stride, vector_of

THREADS = 256
"""About so many threads of a block."""
TOKENS_OF_A_PART = 8
"""A window is averaged by a thread for each so many tokens, as far as there are threads."""


@dataclass(frozen=True)
class AverageTile:
    """Size the work of one block of threads that averages windows.

    Args:
        windows: windows of the block.
        parts: threads that share the tokens of a window, for each vector of channels.
        vector: channels of one load.
        threads: of the block.
    """

    windows: int
    parts: int
    vector: int
    threads: int


def compress_keys(
    k: Tensor, cu_seqlens_k: Tensor, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    """Return the windows `[total_k // kernel_stride, HK, D]`, and their `cu_seqlens_c`.

    No batch of so many keys has more windows; rows behind the last window stay unwritten.
    """
    k = unit_stride(k)
    batch, (total_k, num_heads, head_dim) = len(cu_seqlens_k) - 1, k.shape
    shape = (total_k // kernel_stride, num_heads, head_dim)
    means = torch.empty(shape, dtype=k.dtype, device=k.device)
    if not means.numel():
        return means, torch.zeros_like(cu_seqlens_k)
    ends = torch.empty_like(cu_seqlens_k)
    cu_seqlens_k = cu_seqlens_k.contiguous()
    tile = average_tile(head_dim, kernel_size, vector_of(k))
    kernel = average_kernel("compress", k.dtype, head_dim, kernel_size, kernel_stride, tile)
    grid = (num_slots(total_k, batch, tile.windows * kernel_stride), num_heads, 1)
    strides = (int64(k.stride(0)), int64(k.stride(1)))
    launch(kernel, grid, tile.threads, 0, k, k, means, cu_seqlens_k, ends, batch, *strides)
    return means, ends


@functools.cache
def average_tile(head_dim: int, size: int, vector: int) -> AverageTile:
    """Choose the tile of a kernel that averages; the order of sums depends on no `vector`."""
    parts = 1
    while parts < 8 and 2 * parts * TOKENS_OF_A_PART <= size and 2 * parts * head_dim <= 1024:
        parts *= 2
    each = parts * head_dim // vector
    windows = max(THREADS // each, 1)
    return AverageTile(windows, parts, vector, -(-windows * each // 32) * 32)


@functools.cache
def average_kernel(
    name: str, dtype: torch.dtype, head_dim: int, size: int, stride: int, tile: AverageTile
) -> Kernel:
    """Return the kernel `{name}_kernel` of `{name}.cu`, for these sizes."""
    defines: dict[str, str | int] = {
        "BF16": int(dtype == torch.bfloat16),
        "D": head_dim,
        "VEC": tile.vector,
        "SIZE": size,
        "STRIDE": stride,
        "WINDOWS": tile.windows,
        "PARTS": tile.parts,
    }
    return Kernel(f"{name}.cu", f"{name}_kernel", tuple(defines.items()))
