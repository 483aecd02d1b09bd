"""The lengths of a packed batch, and the windows that belong to it, as kernels take them.

A grid must be known without a look at lengths, which lie on the device: `num_slots` counts tiles of
rows for the worst case, and kernels map a slot to a sequence and a tile of its rows, or to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows


@dataclass(frozen=True)
class Lengths:
    """Hold the lengths of a packed batch: tensors on its device, and the host's upper bounds.

    Args:
        ends_q: `cu_seqlens_q`, int32 `[batch + 1]`.
        ends_k: `cu_seqlens_k`; only differences of neighbours are read where no keys are.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: at least the longest sequence of keys.
    """

    ends_q: Tensor
    ends_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return self.ends_q.shape[0] - 1

    def most_windows(self, config: SparseConfig) -> int:
        """Return at least the windows of K_C1 of the longest sequence."""
        return num_windows(self.max_seqlen_k, config.kernel_size, config.kernel_stride)

    def most_blocks(self, config: SparseConfig) -> int:
        """Return at least the blocks of the longest sequence."""
        return num_blocks(self.max_seqlen_k, config.block_size)


@dataclass(frozen=True)
class Windows:
    """Hold the windows of one kind of all sequences.

    Args:
        means: `[rows, HK, D]`.
        starts: int32, at least `[batch]`: the row of every sequence's first window.
        size: tokens in one window.
        stride: tokens from one window to the next.
    """

    means: Tensor
    starts: Tensor
    size: int
    stride: int


@dataclass(frozen=True)
class Lines:
    """Hold one line of scores for each kv head and query token, of all queries or of some slots.

    Args:
        data: float32 `[HK, lines, columns]`.
        tile: the tokens of one slot (`num_slots`).
        slots: how many slots are worked on.
        first_slot: the first of them.
        by_slot: whether line `i * tile + j` is that of token j of slot `first_slot + i`; else lines
            are packed queries, and all slots are worked on.
    """

    data: Tensor
    tile: int
    slots: int
    first_slot: int = 0
    by_slot: bool = False


def num_slots(total: int, batch: int, tile: int) -> int:
    """Return enough slots for all tiles of `tile` rows, whatever the lengths of the sequences.

    Sequence i, whose rows start at `a = ends[i]`, gets the slots from `a // tile + i` on. They
    suffice: the next sequence starts at a row `b`, hence `b // tile + 1 - a // tile` slots later,
    which is at least `ceil((b - a) / tile)`.

    >>> num_slots(total=100, batch=2, tile=16)
    8
    """
    return total // tile + batch if total else 0
