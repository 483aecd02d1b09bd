"""`attend`: softmax attention over the selected blocks, in CUDA C++, forward only.

Nothing here waits for the device: grids and scratch follow from shapes and from the arguments, so
that calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from infllmv2_impls import checks
from infllmv2_reference.geometry import num_blocks

from . import attend_hopper
from .launch import Kernel, check_runs_on, launch
from .union import Union, unite

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64, 96, 128, 256)
MOST_HEADS = 32
BLOCK_SIZES = (16, 32, 48, 64, 128)

Kernels = Literal["auto", "portable", "hopper"]
"""Which kernels attend; both are right, and the faster one depends on device and shapes."""
ROWS = 64
"""Rows of a tile: 16 for each of four warps."""
MOST_TOKENS = 32
"""A token of a tile is a bit of a word."""
BLOCKS_AT_ONCE = 3
"""Blocks of threads that a multiprocessor has memory for."""
LEAST_PIECES = 2
"""The fewest pieces worth a block of threads of their own."""
MOST_PARTS = 128
"""The most parts of a tile: joining them takes time as well."""
WITHOUT_GPU = 4
"""Multiprocessors that an emulator is said to have: few, as it runs threads one by one."""
LOG2_E = 1.4426950408889634


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_size: int,
    dense_len: int | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend the tokens up to each query's position in the blocks that it selected.

    Args:
        q: `[total_q, HQ, D]`, float16 or bfloat16.
        k: `[total_k, HK, D]`; HQ / HK is at most 32.
        v: as `k`.
        selected: int32 `[HK, total_q, K]`: ascending blocks of the row's own sequence, then -1.
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`; the queries of a sequence are its last tokens.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: at least the longest sequence of keys.
        block_size: B: 16, 32, 48, 64 or 128.
        dense_len: sequences with fewer keys attend everything up to each query, and their rows of
            `selected` are not read (decision D8); None for no such sequence.
        kernels: "portable", "hopper" (wherever that one suits), or "auto": whichever is faster.

    Returns:
        `out` in the dtype of `q`, and `lse` `[total_q, HQ]`, float32, the natural logarithm.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or a size is; values on the device are not looked at.
    """
    checks.check_attend_form(
        q, k, v, selected, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_size,
        dtypes=DTYPES,
    )  # fmt: skip
    _check_support(q, k, block_size)
    q, k, v = (_aligned(x) for x in (q, k, v))
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    lengths = *ends, max_seqlen_k, block_size, max(dense_len or 0, 0)
    if _takes_hopper(q, k, block_size, kernels):
        tokens = attend_hopper.tokens_of_tile(q.shape[1] // k.shape[1])
        union = unite(selected, *lengths, tokens=tokens, piece=attend_hopper.PIECE)
        return attend_hopper.attend_tiles(q, k, v, union, multiprocessors(q.device))
    tile = Tile.of(q, k, max_seqlen_q, block_size)
    union = unite(selected, *lengths, tokens=tile.tokens, piece=tile.piece)
    return _attend_tiles(q, k, v, union, tile, _parts(union, tile, max_seqlen_k, dense_len, q))


@dataclass(frozen=True)
class Tile:
    """State what the kernel is compiled for.

    Args:
        kv_heads: HK.
        group: G, query heads of a kv head.
        head_dim: D.
        tokens: query tokens of a tile.
        heads: rows of a token in it, at least `group`.
        piece: keys that are multiplied at once, an equal part of a block.
        stages: pieces in shared memory.
    """

    kv_heads: int
    group: int
    head_dim: int
    tokens: int
    heads: int
    piece: int
    stages: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, max_seqlen_q: int, block_size: int) -> Tile:
        """Choose the tile for queries `[total_q, HQ, D]` and keys `[total_k, HK, D]`."""
        kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        padded = _power_of_two(group)
        # With fewer tokens than a tile holds, as in decoding, more warps would only idle.
        tokens = min(ROWS // padded, MOST_TOKENS, _power_of_two(max(max_seqlen_q, 1)))
        heads = max(padded, 16 // tokens)
        # Two pieces of keys and values should leave room for a second block of threads.
        piece = min(block_size & -block_size, 64 if dim <= 128 else 32)
        return cls(kv_heads, group, dim, tokens, heads, piece, 2 if dim > 64 else 3)

    @property
    def rows(self) -> int:
        """Return the rows of a tile."""
        return self.tokens * self.heads

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block of threads."""
        ring = self.stages * 2 * self.piece * self.head_dim
        return 2 * (ring + (self.rows * self.head_dim if self.head_dim > 128 else 0))

    def kernel(self, name: str, dtype: torch.dtype, split: bool) -> Kernel:
        """Return one of the two kernels of `attend.cu`."""
        defines = {
            "BF16": int(dtype == torch.bfloat16),
            "GROUP": self.group,
            "HEADS": self.heads,
            "TOKENS": self.tokens,
            "D": self.head_dim,
            "PIECE": self.piece,
            "STAGES": self.stages,
            "SPLIT": int(split),
        }
        return Kernel("attend.cu", name, tuple(defines.items()))


def _takes_hopper(q: Tensor, k: Tensor, block_size: int, kernels: Kernels) -> bool:
    """Say whether the kernel for Hopper GPUs takes this; its tiles are not cut into parts."""
    if kernels == "portable" or not attend_hopper.suits(q, k, block_size):
        return False
    tiles = len(q) // attend_hopper.tokens_of_tile(q.shape[1] // k.shape[1]) * k.shape[1]
    return kernels == "hopper" or tiles >= multiprocessors(q.device)


def _attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, union: Union, tile: Tile, parts: int
) -> tuple[Tensor, Tensor]:
    """Attend the pieces of every tile, in parts: `out` `[total_q, HQ, D]`, `lse` `[total_q, HQ]`.

    Parts are summed over at the same time, and joined by a second kernel.
    """
    total_q, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_q, heads, dtype=torch.float32, device=q.device)
    part_out = part_lse = None
    if parts > 1:
        part_out = torch.empty(parts, total_q, heads, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, total_q, heads, dtype=torch.float32, device=q.device)
    launch(
        tile.kernel("attend", q.dtype, parts > 1),
        (union.num_tiles, tile.kv_heads, parts),
        2 * tile.rows,
        tile.shared_bytes,
        q,
        q,
        k,
        v,
        out,
        lse,
        part_out,
        part_lse,
        union.tiles,
        union.counts,
        union.pieces,
        union.members,
        *(np.int64(stride) for x in (q, k, v) for stride in x.stride()[:2]),
        union.num_tiles,
        union.capacity,
        total_q,
        dim**-0.5 * LOG2_E,
    )
    if parts > 1:
        rows = total_q * heads
        launch(
            tile.kernel("join", q.dtype, True),
            (-(-rows // 4), 1, 1),
            128,
            0,
            q,
            part_out,
            part_lse,
            out,
            lse,
            parts,
            np.int64(rows),
        )
    return out, lse


def _parts(union: Union, tile: Tile, max_seqlen_k: int, dense_len: int | None, q: Tensor) -> int:
    """Return into how many parts tiles are cut, so that there is work for the whole device."""
    total_q = q.shape[0]
    items = -(-total_q // tile.tokens) * tile.kv_heads
    wanted = -(-BLOCKS_AT_ONCE * multiprocessors(q.device) // max(items, 1))
    dense = num_blocks(min(max_seqlen_k, max(dense_len or 0, 0)), tile.piece)
    most = max(union.capacity - 1, dense)  # pieces of a tile
    return max(1, min(wanted, -(-most // LEAST_PIECES), MOST_PARTS))


def _aligned(x: Tensor) -> Tensor:
    """Return `[rows, heads, D]`, copied unless each line begins at a multiple of 16 bytes."""
    strides = [x.stride(i) for i in range(2) if x.shape[i] > 1]
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and not any(s % 8 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _power_of_two(count: int) -> int:
    """Return the first power of two that is at least `count`, which is positive."""
    return 1 << (count - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    return _count_multiprocessors(device) if device.type == "cuda" else WITHOUT_GPU


@functools.cache
def _count_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check_support(q: Tensor, k: Tensor, block_size: int) -> None:
    """Raise unless there is a kernel for these sizes, on this device."""
    check_runs_on("q", q)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, but it is {block_size}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"q must have a head dim of {HEAD_DIMS}, but it has {q.shape[2]}")
    group = q.shape[1] // k.shape[1]
    if group > MOST_HEADS:
        raise ValueError(f"q must have at most {MOST_HEADS} heads per kv head, but it has {group}")
