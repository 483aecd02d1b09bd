"""Stage 7: append tokens to a cache, and average the windows that they complete."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.cache import TokenCache
from infllmv2_impls.packing import num_slots

from .compress import average
from .device import launching_on, unit_stride
from .sequences import find_tile, length, num_windows
from .tuning import append_tile, compress_tile, padded_dim


@dataclass(frozen=True)
class TritonCache(TokenCache):
    """Append by Triton kernels."""

    def append(
        self, k: Tensor, v: Tensor, selection_k: Tensor | None, cu_seqlens: Tensor, max_seqlen: int
    ) -> None:
        """Store new tokens, compress the windows that they complete, and move the lengths on.

        Tokens beyond the capacity are not stored, whatever the lengths say afterwards.
        """
        pairs = [(k, self.keys), (v, self.values)]
        if selection_k is not None:
            pairs.append((selection_k, self.selection_keys))
        for source, target in pairs:
            _append_rows(source, target, cu_seqlens, self.lengths, self.capacity)
        for windows, size, stride in self.kinds():
            most = min(max_seqlen // stride + 1, windows.shape[0] // max(self.batch, 1))
            _append_windows(self, windows, size, stride, cu_seqlens, most)
        self.lengths.add_(cu_seqlens.diff())


@triton.jit(do_not_specialize=["batch", "capacity"])
def append_rows_kernel(
    source,
    target,
    ends,
    lengths,
    batch,
    capacity,
    row_stride,
    head_stride,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copy a tile of new rows behind those of its sequence; `WIDTH` is HK * D."""
    sequence, start, rows, first = find_tile(tl.program_id(0), ends, batch, ROWS)
    if first >= rows:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.load(lengths + sequence) + row
    mask = ((row < rows) & (place < capacity))[:, None] & (column < WIDTH)[None, :]
    inner = (column // D) * head_stride + column % D
    at = source + (start + row).to(tl.int64)[:, None] * row_stride + inner[None, :]
    line = sequence.to(tl.int64) * capacity + place
    out = target + line[:, None] * WIDTH + column[None, :]
    tl.store(out, tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["capacity", "most"])
def append_windows_kernel(
    keys,
    windows,
    ends,
    lengths,
    capacity,
    most,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Average a tile of the windows that new tokens complete; a sequence can hold `most`."""
    sequence = tl.program_id(0).to(tl.int64)
    before = tl.load(lengths + sequence)
    after = tl.minimum(before + length(ends, sequence), capacity)
    first = num_windows(before, SIZE, STRIDE) + tl.program_id(1) * WINDOWS
    end = num_windows(after, SIZE, STRIDE)
    if first >= end:
        return
    window = first + tl.arange(0, WINDOWS)
    row = sequence * capacity + window.to(tl.int64) * STRIDE
    at = keys + row * WIDTH + tl.program_id(2) * D
    mean = average(at, window < end, WIDTH, D, D_PAD, SIZE, AT_ONCE)
    dims = tl.arange(0, D_PAD)
    line = sequence * most + window
    out = windows + line[:, None] * WIDTH + tl.program_id(2) * D + dims[None, :]
    mask = (window < end)[:, None] & (dims < D)[None, :]
    tl.store(out, mean.to(windows.dtype.element_ty), mask=mask)


def _append_rows(
    source: Tensor, target: Tensor, ends: Tensor, lengths: Tensor, capacity: int
) -> None:
    source = unit_stride(source)
    width, rows, columns = source.shape[1] * source.shape[2], *append_tile()
    slots = num_slots(source.shape[0], len(lengths), rows)
    if not slots:
        return
    with launching_on(target):
        append_rows_kernel[slots, triton.cdiv(width, columns)](
            source,
            target,
            ends,
            lengths,
            len(lengths),
            capacity,
            source.stride(0),
            source.stride(1),
            WIDTH=width,
            D=source.shape[2],
            COLUMNS=columns,
            ROWS=rows,
            num_warps=4,
        )


def _append_windows(
    cache: TritonCache, windows: Tensor, size: int, stride: int, ends: Tensor, most_new: int
) -> None:
    num_heads, head_dim = windows.shape[1:]
    tile, at_once = compress_tile(head_dim, size)
    grid = (cache.batch, triton.cdiv(most_new, tile), num_heads)
    if 0 in grid:
        return
    with launching_on(windows):
        append_windows_kernel[grid](
            cache.selection_keys,
            windows,
            ends,
            cache.lengths,
            cache.capacity,
            windows.shape[0] // cache.batch,
            WIDTH=num_heads * head_dim,
            D=head_dim,
            D_PAD=padded_dim(head_dim),
            SIZE=size,
            STRIDE=stride,
            WINDOWS=tile,
            AT_ONCE=at_once,
            num_warps=4,
        )
