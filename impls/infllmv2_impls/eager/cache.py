"""Stage 7: preallocated keys, values and windows of every sequence, and the lengths in use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import cu_seqlens_of

from .places import Place
from .windows import compress


@dataclass
class EagerCache:
    """Hold a fixed number of tokens and windows for each sequence; `lengths` says what is in use.

    Args:
        config: the parameters of the attention.
        keys: `[batch, max_seqlen_k, HK, D]`.
        values: as `keys`.
        selection_keys: as `keys`; the very same tensor without `use_nope`.
        k_c1: `[batch, C, HK, D]`.
        k_c2: `[batch, C2, HK, D]`.
        lengths: the tokens of every sequence.
    """

    config: SparseConfig
    keys: Tensor
    values: Tensor
    selection_keys: Tensor
    k_c1: Tensor
    k_c2: Tensor
    lengths: list[int]

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        tail: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        config: SparseConfig,
    ) -> EagerCache:
        """Return a cache without tokens; `tail` is (HK, D)."""

        def storage(rows: int) -> Tensor:
            return torch.zeros(batch, rows, *tail, dtype=dtype, device=device)

        c1 = num_windows(capacity, config.kernel_size, config.kernel_stride)
        c2 = num_windows(capacity, config.lse_kernel_size, config.lse_kernel_stride)
        keys, values = storage(capacity), storage(capacity)
        selection_keys = storage(capacity) if config.use_nope else keys
        return cls(config, keys, values, selection_keys, storage(c1), storage(c2), [0] * batch)

    @property
    def capacity(self) -> int:
        """Return the most tokens of one sequence."""
        return self.keys.shape[1]

    def append(self, sequence: int, k: Tensor, v: Tensor, selection_k: Tensor | None) -> None:
        """Store new tokens `[t, HK, D]` and compress the windows that they complete."""
        start = self.lengths[sequence]
        end = start + len(k)
        self.keys[sequence, start:end] = k
        self.values[sequence, start:end] = v
        if selection_k is not None:
            self.selection_keys[sequence, start:end] = selection_k
        keys = self.selection_keys[sequence, :end]
        for windows, size, stride in self._kinds():
            first, last = num_windows(start, size, stride), num_windows(end, size, stride)
            windows[sequence, first:last] = compress(keys, size, stride, first)
        self.lengths[sequence] = end

    def places(self, num_queries: list[int]) -> list[Place]:
        """Return where the sequences lie in `keys`, `k_c1` ... with batch and rows flattened."""
        places: list[Place] = []
        end = 0
        for i, (rows, length) in enumerate(zip(num_queries, self.lengths, strict=True)):
            start, end = end, end + rows
            windows = [
                slice(i * x.shape[1], i * x.shape[1] + num_windows(length, size, stride))
                for x, size, stride in self._kinds()
            ]
            first = i * self.capacity
            places.append(Place(slice(start, end), slice(first, first + length), *windows))
        return places

    def packed_windows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return copies of K_C1 and K_C2 of all sequences end to end, each with its cu_seqlens."""
        packed: list[Tensor] = []
        for windows, size, stride in self._kinds():
            counts = [num_windows(n, size, stride) for n in self.lengths]
            used = [windows[i, :count] for i, count in enumerate(counts)]
            empty = windows.new_empty(0, *windows.shape[2:])
            packed += [torch.cat([empty, *used]), cu_seqlens_of(counts, windows.device)]
        return packed[0], packed[1], packed[2], packed[3]

    def _kinds(self) -> list[tuple[Tensor, int, int]]:
        """Return the storage, length and stride of both kinds of windows."""
        c = self.config
        return [
            (self.k_c1, c.kernel_size, c.kernel_stride),
            (self.k_c2, c.lse_kernel_size, c.lse_kernel_stride),
        ]
