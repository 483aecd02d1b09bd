"""What the kernels for Hopper GPUs share: when they apply, how they see tensors, and their ring.

They are written in Gluon, which ships with Triton. A program has two or three groups of four warps
that multiply and one warp that loads: it fills a ring of shared memory with the copy engine, and
the groups wait for its stages and release them. The groups run apart from each other, so that one
takes exponentials while another multiplies.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(64)
"""Rows that a group of warps multiplies at once."""
FORWARD_ROWS = 192
"""Rows of a tile in the forward, for three groups of warps."""
BACKWARD_ROWS = 128
"""Rows of a tile in the backward, for two groups: they need more registers."""

HEAD_DIMS = (64, 128)
GROUPS = (8, 16, 32)
PIECE = 64
ALIGNMENT = 16
"""Bytes that rows of a tensor must be aligned to for the copy engine."""

_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


def applies(device: torch.device, dtype: torch.dtype, group: int, dim: int, block: int) -> bool:
    """Say whether there are such kernels for this device and these sizes."""
    return (
        device.type == "cuda"
        and _capability(device) == (9, 0)
        and dtype in (torch.float16, torch.bfloat16)
        and group in GROUPS
        and dim in HEAD_DIMS
        and block % PIECE == 0
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def boxes(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe `[n, heads, D]` as `[n, heads * D]` to the copy engine, in `[rows, columns]`."""
    heads, dim = x.shape[1:]
    aligned = x.stride(0) * x.element_size() % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    if not (aligned and x.stride()[1:] == (dim, 1)):
        x = x.contiguous().clone() if x.is_contiguous() else x.contiguous()
    return _descriptor(x, (x.shape[0], heads * dim), x.stride(0), rows, columns)


def head_boxes(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe contiguous `[n, heads, D]` to the copy engine as `[n * heads, D]`."""
    return _descriptor(x, (x.shape[0] * x.shape[1], x.shape[2]), x.shape[2], rows, columns)


def _descriptor(
    x: Tensor, shape: tuple[int, int], stride: int, rows: int, columns: int
) -> TensorDescriptor:
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return TensorDescriptor(x, list(shape), [stride, 1], [rows, columns], layout)


@gluon.jit
def tile_record(tile, tiles, FIELDS: gl.constexpr):
    """Return the first six numbers of a tile's record (`union.py`)."""
    record = tiles + tile * FIELDS
    return (
        gl.load(record + 0),
        gl.load(record + 1),
        gl.load(record + 2),
        gl.load(record + 3),
        gl.load(record + 4),
        gl.load(record + 5),
    )


@gluon.jit
def load_pieces(
    k_boxes, v_boxes, pieces, count, dense, key_row, kv_head, k_ring, v_ring, full, empty,
    PIECE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load keys and values of a tile's pieces, one after the other, as stages become free."""
    piece = gl.load(pieces, mask=(dense == 0) & (count > 0), other=count - 1)
    for i in range(count):
        stage = i % STAGES
        row = key_row + piece * PIECE
        column = kv_head * D
        following = (dense == 0) & (i + 1 < count)
        piece = gl.load(pieces + i + 1, mask=following, other=count - 2 - i)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        filled = full.index(stage)
        mbarrier.expect(filled, 2 * k_boxes.block_type.nbytes)
        tma.async_copy_global_to_shared(k_boxes, [row, column], filled, k_ring.index(stage))
        tma.async_copy_global_to_shared(v_boxes, [row, column], filled, v_ring.index(stage))


@gluon.jit
def first_open(count, dense, position, first, num_keys, TOKENS: gl.constexpr, PIECE: gl.constexpr):
    """Return the first piece of a dense tile that the tokens from `position` on attend."""
    some = (position < num_keys) & (position + TOKENS > first)
    latest = gl.where(some, position // PIECE, -1)
    return gl.where(dense != 0, gl.maximum(count - 1 - latest, 0), 0)


@gluon.jit
def next_piece(
    at, limit, members, shift, mask, dense, opens, full, empty, STAGES: gl.constexpr
):  # fmt: skip
    """Return the first piece from `at` on that this group's tokens attend, and their bits.

    The pieces before it are released, each one after it was loaded: a group that did not see every
    round of a stage could take one round for another, or be counted twice in one. At `limit` the
    search ends, attended or not: a group that holds a stage must not wait for a piece that needs
    this very stage.
    """
    every = gl.where(at >= opens, -1, 0)
    bits = (gl.load(members + at, mask=dense == 0, other=every) >> shift) & mask
    while (bits == 0) & (at < limit):
        mbarrier.wait(full.index(at % STAGES), (at // STAGES) & 1)
        mbarrier.arrive(empty.index(at % STAGES), count=1)
        at += 1
        every = gl.where(at >= opens, -1, 0)
        bits = (gl.load(members + at, mask=dense == 0, other=every) >> shift) & mask
    return at, bits


@gluon.jit
def erase_after(ring, stage, piece, num_keys, layout: gl.constexpr, PIECE: gl.constexpr):
    """Overwrite what lies behind the end of a sequence by zeros; all groups may do so at once."""
    rows = ring.index(stage)
    key = piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    rows.store(gl.where((key < num_keys)[:, None], rows.load(layout), 0.0))
    fence_async_shared()
    _meet()  # here, so that no barrier is needed where the rows are multiplied
