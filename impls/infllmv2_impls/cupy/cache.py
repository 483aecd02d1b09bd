"""Stage 7: append tokens to a cache, and average the windows that they complete."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_impls.cache import TokenCache
from infllmv2_impls.packing import num_slots

from .compress import average_kernel, average_tile
from .launch import Kernel, launch
from .rows import int64, unit_stride, vector_of

THREADS = 256
VECTORS_OF_A_THREAD = 4


@dataclass(frozen=True)
class CupyCache(TokenCache):
    """Append by CUDA kernels."""

    def append(
        self, k: Tensor, v: Tensor, selection_k: Tensor | None, cu_seqlens: Tensor, max_seqlen: int
    ) -> None:
        """Store new tokens, compress the windows that they complete, and move the lengths on.

        Tokens beyond the capacity are not stored, whatever the lengths say afterwards.
        """
        cu_seqlens = cu_seqlens.contiguous()
        self._append_rows(k, v, selection_k, cu_seqlens)
        for windows, size, stride in self.kinds():
            most = min(max_seqlen // stride + 1, windows.shape[0] // max(self.batch, 1))
            self._append_windows(windows, size, stride, cu_seqlens, most)
        advance = Kernel("append_rows.cu", "advance_kernel", _row_defines(self.keys, 1))
        grid = (-(-self.batch // THREADS), 1, 1)
        lengths = self.lengths
        launch(advance, grid, THREADS, 0, lengths, cu_seqlens, lengths, self.batch)

    def _append_rows(
        self, k: Tensor, v: Tensor, selection_k: Tensor | None, cu_seqlens: Tensor
    ) -> None:
        """Copy new rows of all kinds behind the old ones."""
        new = [unit_stride(x) for x in (k, v, selection_k) if x is not None]
        stored = (self.keys, self.values, self.selection_keys)
        defines = _row_defines(self.keys, vector_of(*new, *stored))
        kernel = Kernel("append_rows.cu", "append_rows_kernel", defines)
        slots = num_slots(k.shape[0], self.batch, dict(defines)["ROWS"])
        strides = [int64(x.stride(axis)) for x in new for axis in (0, 1)]
        if selection_k is None:
            new.append(new[0])
            strides += strides[:2]
        limits = (self.batch, self.capacity)
        launch(
            kernel, (slots, 1, 2 if selection_k is None else 3), THREADS, 0, self.keys,
            *new, *stored, cu_seqlens, self.lengths, *limits, *strides,
        )  # fmt: skip

    def _append_windows(
        self, windows: Tensor, size: int, stride: int, cu_seqlens: Tensor, most_new: int
    ) -> None:
        """Average the windows of one kind that new rows complete, at most so many of a sequence."""
        num_heads, head_dim = windows.shape[1:]
        keys, batch = self.selection_keys, self.batch
        tile = average_tile(head_dim, size, vector_of(keys, windows))
        kernel = average_kernel("append_windows", windows.dtype, head_dim, size, stride, tile)
        grid = (batch, -(-most_new // tile.windows), num_heads)
        limits = (self.capacity, windows.shape[0] // max(batch, 1))
        launch(
            kernel, grid, tile.threads, 0, keys, keys, windows, cu_seqlens, self.lengths, *limits
        )


def _row_defines(rows: Tensor, vector: int) -> tuple[tuple[str, int], ...]:
    return _defines(rows.dtype, rows.shape[1], rows.shape[2], vector)


@functools.cache
def _defines(
    dtype: torch.dtype, num_heads: int, head_dim: int, vector: int
) -> tuple[tuple[str, int], ...]:
    """Return the macros of `append_rows.cu`: blocks copy a few vectors of each thread."""
    width = num_heads * head_dim
    rows = max(THREADS * VECTORS_OF_A_THREAD * vector // width, 1)
    is_bf16 = int(dtype == torch.bfloat16)
    return ("BF16", is_bf16), ("D", head_dim), ("VEC", vector), ("WIDTH", width), ("ROWS", rows)
