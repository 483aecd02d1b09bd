"""The forward of `attend` for Hopper GPUs: the host's side of `attend_hopper.cu`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from .launch import Kernel, capability, encode_tensor_map, launch
from .union import Union

PIECE = 64
ROWS = 192
"""Rows of a tile: 64 for each of three groups of warps."""
THREADS = 512
GROUPS = (8, 16, 32)
STAGES = {64: 8, 128: 5}
"""Pieces in shared memory, by head dim."""
LOG2_E = 1.4426950408889634

_ALIGNMENT = 1024
"""Bytes; of the kernel's shared memory, and so of its size."""
_MAP = np.dtype([("words", np.uint64, (16,))])
_PANEL = 64
"""Channels of one box of the copy engine: 128 bytes, the width of its swizzle."""
_BFLOAT16, _FLOAT16 = 9, 6  # CUtensorMapDataType
_SWIZZLE_128, _PROMOTE_L2_128 = 3, 2  # CUtensorMapSwizzle, CUtensorMapL2promotion


def suits(q: Tensor, k: Tensor, block_size: int) -> bool:
    """Say whether the kernel takes queries `[total_q, HQ, D]` and keys `[total_k, HK, D]`."""
    return (
        capability(q.device) == (9, 0)
        and len(q) > 0
        and len(k) > 0
        and q.shape[2] in STAGES
        and q.shape[1] // k.shape[1] in GROUPS
        and block_size % PIECE == 0
    )


def tokens_of_tile(group: int) -> int:
    """Return the query tokens of a tile."""
    return ROWS // group


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, union: Union, multiprocessors: int
) -> tuple[Tensor, Tensor]:
    """Attend the pieces of every tile: `out` `[total_q, HQ, D]` and `lse` `[total_q, HQ]`.

    There are as many blocks of threads as multiprocessors, if there are so many tiles. Rows of `q`,
    `k` and `v` begin at multiples of 16 bytes, and their last axis is contiguous.
    """
    total_q, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_q, heads, dtype=torch.float32, device=q.device)
    launch(
        kernel(q.dtype, heads // k.shape[1], dim),
        (min(union.num_tiles * k.shape[1], multiprocessors), 1, 1),
        THREADS,
        shared_bytes(dim),
        q,
        tensor_map(k),
        tensor_map(v),
        q,
        out,
        lse,
        union.tiles,
        union.counts,
        union.pieces,
        union.members,
        *(np.int64(stride) for stride in q.stride()[:2]),
        union.num_tiles,
        k.shape[1],
        union.capacity,
        dim**-0.5 * LOG2_E,
    )
    return out, lse


def kernel(dtype: torch.dtype, group: int, dim: int) -> Kernel:
    """Return the kernel for these sizes."""
    defines = {
        "BF16": int(dtype == torch.bfloat16),
        "GROUP": group,
        "D": dim,
        "STAGES": STAGES[dim],
        "SHARED_BYTES": shared_bytes(dim),
    }
    return Kernel("attend_hopper.cu", "attend_hopper", tuple(defines.items()), hopper=True)


def shared_bytes(dim: int) -> int:
    """Return the shared memory of a block of threads, the size of its `Shared`."""
    tiles = (ROWS + 2 * STAGES[dim] * PIECE) * dim * 2  # queries, keys and values
    rings = 2 * (2 * 8 * STAGES[dim] + 8)
    return -(-(tiles + rings) // _ALIGNMENT) * _ALIGNMENT


def tensor_map(x: Tensor, box: tuple[int, int] = (PIECE, 1)) -> np.void:
    """Describe `[rows, heads, D]` to the copy engine, in boxes of 64 channels.

    What lies outside is read as 0.

    Args:
        x: begins at a multiple of 16 bytes, as do all its lines.
        box: rows and heads of a box.

    Raises:
        RuntimeError: the driver does not take it.
    """
    rows, heads, dim = x.shape
    item = x.element_size()
    words = np.zeros(16 + 8, dtype=np.uint64)
    skip = -words.ctypes.data % 64 // 8  # the driver wants an aligned one
    words = words[skip : skip + 16]
    status = encode_tensor_map(
        ctypes.c_void_p(words.ctypes.data),
        _BFLOAT16 if x.dtype == torch.bfloat16 else _FLOAT16,
        3,
        ctypes.c_void_p(x.data_ptr()),
        (ctypes.c_uint64 * 3)(dim, heads, rows),
        (ctypes.c_uint64 * 2)(*(_stride(x, axis) * item for axis in (1, 0))),
        (ctypes.c_uint32 * 3)(_PANEL, box[1], box[0]),
        (ctypes.c_uint32 * 3)(1, 1, 1),
        0,
        _SWIZZLE_128,
        _PROMOTE_L2_128,
        0,
    )
    if status != 0:
        raise RuntimeError(
            f"the driver refuses to describe {tuple(x.shape)} with strides {x.stride()} to the "
            f"copy engine: cuTensorMapEncodeTiled returned {status}"
        )
    return np.frombuffer(words.tobytes(), dtype=_MAP)[0]


def _stride(x: Tensor, axis: int) -> int:
    """Return a stride; that of an axis of one element may be anything, so a legal one."""
    return x.stride(axis) if x.shape[axis] > 1 else x.shape[2]
