"""What the kernels for Hopper GPUs that walk over windows share: their loader, and who works where."""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import hopper, sequences

find_tile = gluon.jit(sequences.find_tile.fn)
length = gluon.jit(sequences.length.fn)
num_windows = gluon.jit(sequences.num_windows.fn)


def applies(q: Tensor, windows: Tensor) -> bool:
    """Say whether there are such kernels for these queries and windows."""
    group = triton.next_power_of_2(q.shape[1] // windows.shape[1])
    sizes = (group, q.shape[2], hopper.PIECE)
    return len(windows) > 0 and hopper.applies(q.device, q.dtype, *sizes)


@gluon.jit
def load_tiles(boxes, row, column, tiles, ring, full, empty, STAGES: gl.constexpr):
    """Load windows, tile after tile, as stages become free."""
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        filled = full.index(stage)
        mbarrier.expect(filled, boxes.block_type.nbytes)
        tma.async_copy_global_to_shared(
            boxes, [row + i * boxes.block_type.shape[0], column], filled, ring.index(stage)
        )
