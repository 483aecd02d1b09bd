"""Keys, values and windows of all sequences in memory of a fixed size, and their lengths.

Lengths lie on the device, so that neither appending nor decoding waits for it, and a step of both
can be captured in a CUDA graph.

Sequence i has the rows from `i * capacity` on. As a packed batch, that is two sequences for each
one: its tokens, and the free room behind them, of which nobody asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import cu_seqlens_of


@dataclass(frozen=True)
class TokenCache:
    """Hold the tokens and windows of every sequence.

    Args:
        config: the parameters of the attention.
        keys: `[batch * capacity, HK, D]`.
        values: as `keys`.
        selection_keys: as `keys`; the very same tensor without `use_nope`.
        k_c1: `[batch * C, HK, D]`.
        k_c2: `[batch * C2, HK, D]`.
        lengths: int32 `[batch]`, the tokens of every sequence.
        capacity: the most tokens of a sequence.
    """

    config: SparseConfig
    keys: Tensor
    values: Tensor
    selection_keys: Tensor
    k_c1: Tensor
    k_c2: Tensor
    lengths: Tensor
    capacity: int

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        tail: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        config: SparseConfig,
    ) -> Self:
        """Return a cache without tokens; `tail` is (HK, D)."""

        def storage(rows: int) -> Tensor:
            return torch.zeros(batch * rows, *tail, dtype=dtype, device=device)

        c = config
        k_c1 = storage(num_windows(capacity, c.kernel_size, c.kernel_stride))
        k_c2 = storage(num_windows(capacity, c.lse_kernel_size, c.lse_kernel_stride))
        keys, values = storage(capacity), storage(capacity)
        selection_keys = storage(capacity) if c.use_nope else keys
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(c, keys, values, selection_keys, k_c1, k_c2, lengths, capacity)

    @property
    def batch(self) -> int:
        """Return the number of sequences."""
        return self.lengths.shape[0]

    def kinds(self) -> list[tuple[Tensor, int, int]]:
        """Return the storage, size and stride of both kinds of windows."""
        c = self.config
        return [
            (self.k_c1, c.kernel_size, c.kernel_stride),
            (self.k_c2, c.lse_kernel_size, c.lse_kernel_stride),
        ]

    def packing(self, cu_seqlens_q: Tensor) -> tuple[Tensor, Tensor]:
        """Return `cu_seqlens_q` and `cu_seqlens_k` of the batch, its room as further sequences.

        Each sequence of tokens is followed by its free room, which has keys and no queries.
        """
        starts = self._starts(self.capacity)
        ends_k = torch.stack([starts + self.lengths, starts + self.capacity], dim=1).flatten()
        ends_q = cu_seqlens_q[1:].repeat_interleave(2)
        first = torch.zeros(1, dtype=torch.int32, device=ends_k.device)
        return torch.cat([first, ends_q]), torch.cat([first, ends_k])

    def window_starts(self, windows: Tensor) -> Tensor:
        """Return the first row of every sequence of `packing` in `k_c1` or `k_c2`, and one more."""
        starts = self._starts(windows.shape[0] // max(self.batch, 1)).repeat_interleave(2)
        return torch.nn.functional.pad(starts, (0, 1))

    def packed_windows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return copies of K_C1 and K_C2 of all sequences end to end, each with its cu_seqlens."""
        packed: list[Tensor] = []
        for windows, size, stride in self.kinds():
            counts = [num_windows(n, size, stride) for n in self.lengths.tolist()]
            each = windows.shape[0] // max(self.batch, 1)
            used = [windows[i * each : i * each + n] for i, n in enumerate(counts)]
            packed += [torch.cat([windows[:0], *used]), cu_seqlens_of(counts, windows.device)]
        return packed[0], packed[1], packed[2], packed[3]

    def _starts(self, rows: int) -> Tensor:
        """Return `i * rows` for every sequence i."""
        return torch.arange(self.batch, dtype=torch.int32, device=self.lengths.device) * rows
