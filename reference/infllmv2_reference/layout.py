"""Packed batches: several sequences laid end to end, told apart by cumulative lengths.

The convention is FlashAttention's: `cu_seqlens` is int32 `[batch + 1]`, starts at 0, and sequence i
owns the rows `cu_seqlens[i] : cu_seqlens[i + 1]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int32
from torch import Tensor

from .geometry import num_windows


@dataclass(frozen=True)
class Span:
    """Say where one sequence of a packed batch lies.

    Args:
        sequence: its index in the batch.
        queries: its rows in the packed queries.
        keys: its rows in the packed keys and values.
    """

    sequence: int
    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        """Return T."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Return S."""
        return self.keys.stop - self.keys.start


def cu_seqlens_of(
    lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Int32[Tensor, "batch_plus_1"]:
    """Return the cumulative lengths of a packed batch.

    >>> cu_seqlens_of([3, 0, 5])
    tensor([0, 3, 3, 8], dtype=torch.int32)
    """
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def lengths_of(cu_seqlens: Int32[Tensor, "batch_plus_1"]) -> list[int]:
    """Return the length of every sequence of a packed batch."""
    return cu_seqlens.diff().tolist()


def window_lengths(
    cu_seqlens_k: Int32[Tensor, "batch_plus_1"], kernel_size: int, kernel_stride: int
) -> list[int]:
    """Return how many complete windows every sequence of a packed batch has."""
    return [num_windows(n, kernel_size, kernel_stride) for n in lengths_of(cu_seqlens_k)]


def spans(
    cu_seqlens_q: Int32[Tensor, "batch_plus_1"], cu_seqlens_k: Int32[Tensor, "batch_plus_1"]
) -> Iterator[Span]:
    """Yield the place of every sequence of a packed batch, in order."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        yield Span(i, slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1]))


def check_packed(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """Raise unless the lengths describe a packed batch of causal attention.

    Args:
        cu_seqlens_q: int32 `[batch + 1]`.
        cu_seqlens_k: int32 `[batch + 1]`; no sequence has more queries than keys.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: at least the longest sequence of keys.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: anything else does not hold; the message names the argument and its value.
    """
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, "max_seqlen_q")
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, "max_seqlen_k")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q ({len(cu_seqlens_q)}), "
            f"but it has {len(cu_seqlens_k)}"
        )
    for i, (t, s) in enumerate(
        zip(lengths_of(cu_seqlens_q), lengths_of(cu_seqlens_k), strict=True)
    ):
        if t > s:
            raise ValueError(
                f"cu_seqlens_q must give no sequence more queries than keys, but sequence {i} has "
                f"{t} queries and {s} keys"
            )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, max_seqlen: int, max_name: str) -> None:
    """Raise unless `cu_seqlens` is int32 `[batch + 1]`, starts at 0 and never falls.

    Raises:
        TypeError: the tensor is not int32.
        ValueError: the shape or a value is wrong, or a sequence is longer than `max_seqlen`.
    """
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, but it is {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must have shape [batch + 1], but it has {list(cu_seqlens.shape)}")
    values = cu_seqlens.tolist()
    if values[0] != 0 or values != sorted(values):
        raise ValueError(f"{name} must start at 0 and never fall, but it is {values}")
    longest = max(lengths_of(cu_seqlens), default=0)
    if longest > max_seqlen:
        raise ValueError(
            f"{max_name} must be at least the longest sequence of {name} ({longest}), "
            f"but it is {max_seqlen}"
        )
