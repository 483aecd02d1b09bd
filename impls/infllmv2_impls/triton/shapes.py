"""Sizes that kernels are compiled for, and the table of configurations that follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import hopper
from .union import FIELDS, Union


@dataclass(frozen=True)
class Shape:
    """State what kernels are specialised for.

    Args:
        kv_heads: HK.
        group: G, query heads of a kv head.
        head_dim: D.
        block_size: B.
        hopper: whether the kernels for Hopper GPUs are used.
        rows: rows of a tile of the kernels that are not for Hopper GPUs.
        piece: keys that are multiplied at once, an equal part of a block.
    """

    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    hopper: bool
    rows: int
    piece: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, block_size: int) -> Shape:
        """Read the sizes of queries `[total_q, HQ, D]` and keys `[total_k, HK, D]`."""
        kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        fast = len(q) > 0 and len(k) > 0
        fast = fast and hopper.applies(q.device, q.dtype, group, dim, block_size)
        exact = q.dtype == torch.float32  # multiplied without tensor cores, and unrolled
        piece = (32 if exact else 64) // (2 if dim > 128 else 1)
        rows = 32 if exact else 64  # 64 are the fewest that the fast instructions take
        if not q.is_cuda:
            rows = 256  # the interpreter takes as long for a large tile as for a small one
        piece = min(block_size & -block_size, piece)
        return cls(kv_heads, group, dim, block_size, fast, rows, piece)

    @property
    def scale(self) -> float:
        """Return the factor of the logits."""
        return self.head_dim**-0.5

    @property
    def padded_group(self) -> int:
        """Return the rows that a token has in a tile."""
        return triton.next_power_of_2(self.group)

    @property
    def padded_dim(self) -> int:
        """Return the columns that a row has in a tile."""
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def forward_tokens(self) -> int:
        """Return the tokens of a tile in the forward."""
        return self._tokens(hopper.FORWARD_ROWS)

    @property
    def backward_tokens(self) -> int:
        """Return the tokens of a tile in the backward."""
        return self._tokens(hopper.BACKWARD_ROWS)

    def _tokens(self, rows: int) -> int:
        if self.hopper:
            return rows // self.group
        return max(1, min(self.rows // self.padded_group, 16, self.piece))

    @property
    def readers(self) -> int:
        """Return the readers of a piece that are summed over at once."""
        return max(1, min(self.rows, 128) // self.padded_group)

    def item_readers(self, total_q: int) -> int:
        """Return the most readers of a piece that one program sums over."""
        return 4096 if total_q <= 1 << 15 else 8192

    def sizes(self) -> dict[str, Any]:
        """Return the constants of all kernels."""
        return {
            "GROUP": self.group,
            "D": self.head_dim,
            "D_PAD": self.padded_dim,
            "PIECE": self.piece,
            "PRECISION": "ieee",
        }

    def tile_sizes(self, union: Union) -> dict[str, Any]:
        """Return the constants of kernels over tiles."""
        heads = max(self.padded_group, 16 // union.tokens)
        return {**self.sizes(), "HEADS": heads, "TOKENS": union.tokens, "FIELDS": FIELDS}
