"""Stage 7: keys, values and windows of all sequences in memory of a fixed size, and their lengths.

Lengths lie on the device, where `append` moves them on, so that neither it nor decoding waits for
it, and a step of both can be captured in a CUDA graph.

Sequence i has the rows from `i * capacity` on. As a packed batch, that is two sequences for each
one: its tokens, and the free room behind them, of which nobody asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from infllmv2_impls.packing import num_slots
from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_windows as num_windows_of
from infllmv2_reference.layout import cu_seqlens_of

from .compress import average
from .device import launching_on, unit_stride
from .sequences import find_tile, length, num_windows
from .tuning import append_tile, compress_tile, padded_dim


@dataclass(frozen=True)
class TritonCache:
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
    ) -> TritonCache:
        """Return a cache without tokens; `tail` is (HK, D)."""

        def storage(rows: int) -> Tensor:
            return torch.zeros(batch * rows, *tail, dtype=dtype, device=device)

        c = config
        k_c1 = storage(num_windows_of(capacity, c.kernel_size, c.kernel_stride))
        k_c2 = storage(num_windows_of(capacity, c.lse_kernel_size, c.lse_kernel_stride))
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
            counts = [num_windows_of(n, size, stride) for n in self.lengths.tolist()]
            each = windows.shape[0] // max(self.batch, 1)
            used = [windows[i * each : i * each + n] for i, n in enumerate(counts)]
            packed += [torch.cat([windows[:0], *used]), cu_seqlens_of(counts, windows.device)]
        return packed[0], packed[1], packed[2], packed[3]

    def _starts(self, rows: int) -> Tensor:
        """Return `i * rows` for every sequence i."""
        return torch.arange(self.batch, dtype=torch.int32, device=self.lengths.device) * rows


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
