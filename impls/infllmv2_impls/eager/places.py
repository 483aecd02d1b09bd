"""Where the sequences of a call lie, and how their rows are cut into chunks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import spans

CHUNK_BYTES = 96 << 20
"""Bytes of temporary tensors that one chunk of query rows aims at; a single row may need more."""


@dataclass(frozen=True)
class Place:
    """Say where one sequence lies in tensors that hold several.

    Args:
        queries: its rows of q.
        keys: its rows of k and v.
        windows: its rows of K_C1.
        lse_windows: its rows of K_C2.
    """

    queries: slice
    keys: slice
    windows: slice = field(default_factory=lambda: slice(0, 0))
    lse_windows: slice = field(default_factory=lambda: slice(0, 0))

    @property
    def num_queries(self) -> int:
        """Return T."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Return S."""
        return self.keys.stop - self.keys.start

    @property
    def num_windows(self) -> int:
        """Return C."""
        return self.windows.stop - self.windows.start

    def positions(self, device: torch.device) -> Tensor:
        """Return the positions of the queries, int64 `[T]`."""
        return torch.arange(self.num_keys - self.num_queries, self.num_keys, device=device)

    def chunks(self, bytes_per_row: int) -> Iterator[slice]:
        """Cut `0 .. T` into runs of rows that need about `CHUNK_BYTES` together."""
        step = max(1, CHUNK_BYTES // max(1, bytes_per_row))
        for start in range(0, self.num_queries, step):
            yield slice(start, min(start + step, self.num_queries))

    def rows(self, chunk: slice) -> slice:
        """Return the rows of q that are the sequence's own rows `chunk`."""
        return slice(self.queries.start + chunk.start, self.queries.start + chunk.stop)


def packed_places(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, config: SparseConfig | None = None
) -> list[Place]:
    """Return the places in a packed batch, with packed windows if `config` is given."""
    places: list[Place] = []
    end1 = end2 = 0
    for span in spans(cu_seqlens_q, cu_seqlens_k):
        if config is None:
            places.append(Place(span.queries, span.keys))
            continue
        start1, start2 = end1, end2
        c = config
        end1 += num_windows(span.num_keys, c.kernel_size, c.kernel_stride)
        end2 += num_windows(span.num_keys, c.lse_kernel_size, c.lse_kernel_stride)
        places.append(Place(span.queries, span.keys, slice(start1, end1), slice(start2, end2)))
    return places


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
