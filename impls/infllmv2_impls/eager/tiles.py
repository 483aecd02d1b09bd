"""What is attended at once: rows of queries, and the gathered tokens of each group of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .places import CHUNK_BYTES, Place, wide_dtype

DIAGONAL_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """List the tokens that a chunk of query rows attends together.

    The rows are cut into R groups of equally many; all rows of a group attend the same tokens.

    Args:
        tokens: row numbers in the keys `[S * HK, D]`, int64 `[HK, R, L]`; any where not admitted.
        admitted: whether the token is attended, bool `[HK, R, L]`.
    """

    tokens: Tensor
    admitted: Tensor

    def gather(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tokens of `rows` `[S * HK, D]` as `[HK, R, L, D]`, 0 where not admitted."""
        gathered = rows.index_select(0, self.tokens.flatten())
        gathered = gathered.view(*self.tokens.shape, rows.shape[1])
        return gathered.masked_fill_(~self.admitted[..., None], 0).to(dtype)

    def add_to(self, rows: Tensor, values: Tensor) -> None:
        """Add `values` `[HK, R, L, D]` to `rows` `[S * HK, D]` where admitted, in a fixed order."""
        values = values.masked_fill(~self.admitted[..., None], 0).flatten(0, 2)
        if rows.is_cuda:  # there index_add_ is atomic, hence in no fixed order; this one sorts
            rows.index_put_((self.tokens.flatten(),), values, accumulate=True)
        else:
            rows.index_add_(0, self.tokens.flatten(), values)


@dataclass(frozen=True)
class Sizes:
    """State the sizes that the bytes of a tile follow from: heads, and bytes for one token."""

    num_kv_heads: int
    group: int
    gathered: int
    logit: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Sizes:
        """Read the sizes of queries `[total_q, HQ, D]` and keys `[total_k, HK, D]`."""
        wide = wide_dtype(q.dtype).itemsize
        group = q.shape[1] // k.shape[1]
        return cls(k.shape[1], group, 2 * q.shape[2] * (wide + q.element_size()) + 32, 4 * wide)

    def bytes(self, tokens: int, rows: int = 1) -> int:
        """Estimate the temporary bytes of `rows` query rows that share `tokens` tokens."""
        return self.num_kv_heads * tokens * (self.gathered + self.logit * self.group * rows)


def sparse_chunks(
    selected: Tensor, place: Place, block_size: int, sizes: Sizes
) -> Iterator[tuple[slice, list[Tile]]]:
    """Yield chunks of a sequence's rows with the tiles of their blocks, `selected` `[HK, T, K]`."""
    positions = place.positions(selected.device)
    slots = selected.shape[2]
    row_bytes = sizes.bytes(slots * block_size)
    step = max(1, min(slots, CHUNK_BYTES // max(1, sizes.bytes(block_size))))
    for chunk in place.chunks(row_bytes):
        last = place.num_keys - place.num_queries + chunk.stop - 1
        used = min(slots, last // block_size + 1)  # blocks ascend: later slots are in the future
        blocks, at = selected[:, chunk, :used], positions[chunk]
        parts = [blocks[..., i : i + step] for i in range(0, used, step)]
        yield chunk, [_sparse_tile(part, at, block_size) for part in parts]


def _sparse_tile(selected: Tensor, positions: Tensor, block_size: int) -> Tile:
    """Return the tile of blocks `[HK, t, K]`: every row attends tokens of its own."""
    tokens = selected[..., None].long() * block_size
    tokens = tokens + torch.arange(block_size, device=selected.device)  # [HK, t, K, B]
    admitted = (selected[..., None] >= 0) & (tokens <= positions[:, None, None])
    return _tile(tokens.flatten(2), admitted.flatten(2))


def dense_chunks(
    place: Place, sizes: Sizes, device: torch.device
) -> Iterator[tuple[slice, list[Tile]]]:
    """Yield chunks of a sequence's rows with the tiles of all tokens up to each row.

    The tokens up to a chunk's first row are attended by all its rows, and need no mask. The few
    from there to its last row are gathered for every row, so that no row reads its future.
    """
    positions = place.positions(device)
    limit = max(1, min(DIAGONAL_ROWS, CHUNK_BYTES // sizes.bytes(DIAGONAL_ROWS)))
    for start in range(0, place.num_queries, limit):
        chunk = slice(start, min(start + limit, place.num_queries))
        shared = place.num_keys - place.num_queries + start + 1
        rows = chunk.stop - chunk.start
        step = max(1, CHUNK_BYTES // sizes.bytes(1, rows))
        tiles = []
        for first in range(0, shared, step):
            tokens = torch.arange(first, min(first + step, shared), device=device)
            tiles.append(_shared_tile(tokens, sizes.num_kv_heads))
        if rows > 1:
            tokens = torch.arange(shared, shared + rows - 1, device=device)
            tiles.append(_diagonal_tile(tokens, positions[chunk], sizes.num_kv_heads))
        yield chunk, tiles


def _shared_tile(tokens: Tensor, num_kv_heads: int) -> Tile:
    tokens = tokens.expand(num_kv_heads, 1, -1)
    return _tile(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _diagonal_tile(tokens: Tensor, positions: Tensor, num_kv_heads: int) -> Tile:
    admitted = (tokens <= positions[:, None]).expand(num_kv_heads, -1, -1)
    return _tile(tokens.expand_as(admitted), admitted)


def _tile(tokens: Tensor, admitted: Tensor) -> Tile:
    """Turn tokens `[HK, R, L]` into rows of `[S * HK, D]`; any row of the head, if not admitted."""
    num_kv_heads = tokens.shape[0]
    heads = torch.arange(num_kv_heads, device=tokens.device)[:, None, None]
    return Tile(torch.where(admitted, tokens, 0) * num_kv_heads + heads, admitted)
