"""Stages 3 and 4 for chunks of query rows: pool by an index table, select by one stable sort."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_blocks

from .places import Place, wide_dtype
from .windows import compress, pad_windows, score, score_bytes, visible_windows

_SELECT_BYTES = 64
"""Estimated temporary bytes of `select` for one block of one row."""


def pool(scores: Tensor, positions: Tensor, num_keys: int, config: SparseConfig) -> Tensor:
    """Pool the scores of windows `[HK, t, C]` into those of blocks `[HK, t, N]`.

    Source: Eq. 7 (decision D5).
    """
    count = scores.shape[2]
    visible = visible_windows(positions, count, config.kernel_size, config.kernel_stride)
    scores = scores.masked_fill(~visible, -torch.inf)
    scores = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)  # column C: no window
    table = _windows_of_blocks(num_blocks(num_keys, config.block_size), count, config)
    table = table.to(scores.device)  # [N, W]
    pooled = scores.index_select(2, table.flatten())
    return pooled.unflatten(2, table.shape).amax(dim=-1)


def _windows_of_blocks(blocks: int, count: int, config: SparseConfig) -> Tensor:
    """List the windows that every block pools, int64 `[blocks, W]`; `count` stands for none."""
    size, stride, block_size = config.kernel_size, config.kernel_stride, config.block_size
    starts = torch.arange(blocks) * block_size
    if config.pooling == "overlap":
        first = (starts - size).div(stride, rounding_mode="floor") + 1
        end = (starts + block_size - 1).div(stride, rounding_mode="floor") + 1
    else:
        first = starts.div(stride, rounding_mode="floor")
        end = first + (block_size + size) // stride - 1
    width = int((end - first).max()) if blocks else 1
    table = first[:, None] + torch.arange(width)
    exists = (table >= 0) & (table < end[:, None].clamp(max=count))
    return torch.where(exists, table, count)


def select(block_scores: Tensor, positions: Tensor, config: SparseConfig) -> Tensor:
    """Select blocks by their scores `[HK, t, N]`: int32 `[HK, t, K]`, ascending, then -1.

    Source: Eq. 2 and 3 (decisions D6, D7).
    """
    *rows, count = block_scores.shape
    blocks = torch.arange(count, device=block_scores.device)
    own = positions.div(config.block_size, rounding_mode="floor")[:, None]  # [t, 1]
    visible = blocks <= own  # [t, N]
    forced = visible & ((blocks < config.init_blocks) | (blocks > own - config.local_blocks))
    free = visible & ~forced
    slots = config.budget - forced.sum(dim=-1, keepdim=True)  # [t, 1]

    ranked = torch.where(free, block_scores, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices  # [HK, t, N]
    candidate = free.expand(*rows, count).gather(-1, order)
    taken = candidate & (candidate.cumsum(dim=-1) <= slots)
    chosen = torch.zeros_like(taken).scatter_(-1, order, taken) | forced

    budget = config.budget
    column = torch.where(chosen, chosen.cumsum(dim=-1) - 1, budget)  # the last is thrown away
    selected = torch.full((*rows, budget + 1), -1, dtype=torch.int32, device=blocks.device)
    ids = blocks.to(torch.int32).expand(*rows, count)
    return selected.scatter_(-1, column, ids)[..., :budget]


def score_sequences(
    q: Tensor,
    k_c1: Tensor,
    k_c2: Tensor,
    places: list[Place],
    columns: int,
    config: SparseConfig,
    *,
    pooled: bool,
) -> Tensor:
    """Return the scores of windows, or `pooled` those of blocks: `[HK, total_q, columns]`."""
    shape = k_c1.shape[1], len(q), columns
    result = q.new_full(shape, -torch.inf, dtype=wide_dtype(q.dtype))
    for place in places:
        for rows, positions, scores in _score_chunks(q, k_c1, k_c2, place, config):
            if pooled:
                scores = pool(scores, positions, place.num_keys, config)
            result[:, rows, : scores.shape[2]] = scores
    return result


def pool_sequences(
    scores: Tensor, places: list[Place], columns: int, config: SparseConfig
) -> Tensor:
    """Pool the windows `[HK, total_q, C]` of a batch into blocks `[HK, total_q, columns]`."""
    result = scores.new_full((*scores.shape[:2], columns), -torch.inf)
    for place in places:
        positions = place.positions(scores.device)
        for chunk in place.chunks(score_bytes(place, scores.shape[0], scores.dtype, config)):
            rows, own = place.rows(chunk), slice(place.num_windows)
            pooled = pool(scores[:, rows, own], positions[chunk], place.num_keys, config)
            result[:, rows, : pooled.shape[2]] = pooled
    return result


def select_sequences(block_scores: Tensor, places: list[Place], config: SparseConfig) -> Tensor:
    """Select by the scores of a batch `[HK, total_q, N]`: int32 `[HK, total_q, K]`."""
    num_kv_heads, total_q, _ = block_scores.shape
    shape = num_kv_heads, total_q, config.budget
    result = torch.full(shape, -1, dtype=torch.int32, device=block_scores.device)
    for place in places:
        positions = place.positions(block_scores.device)
        own = slice(num_blocks(place.num_keys, config.block_size))
        for chunk in place.chunks(_SELECT_BYTES * num_kv_heads * own.stop):
            rows = place.rows(chunk)
            result[:, rows] = select(block_scores[:, rows, own], positions[chunk], config)
    return result


def select_sequence(
    q: Tensor, k_c1: Tensor, k_c2: Tensor, place: Place, config: SparseConfig, result: Tensor
) -> None:
    """Score, pool and select chunk by chunk, into the sequence's rows of `[HK, total_q, K]`."""
    for rows, positions, scores in _score_chunks(q, k_c1, k_c2, place, config):
        block_scores = pool(scores, positions, place.num_keys, config)
        result[:, rows] = select(block_scores, positions, config)


def select_by_keys(
    q: Tensor, keys: Tensor, place: Place, config: SparseConfig, result: Tensor
) -> None:
    """Do as `select_sequence`, from the keys `[S, HK, D]` of the sequence."""
    c = config
    k_c1 = compress(keys, c.kernel_size, c.kernel_stride)
    k_c2 = keys[:0]
    if c.lse == "approximate":
        k_c2 = compress(keys, c.lse_kernel_size, c.lse_kernel_stride)
    place = Place(place.queries, place.keys, slice(0, len(k_c1)), slice(0, len(k_c2)))
    select_sequence(q, k_c1, k_c2, place, config, result)


def _score_chunks(
    q: Tensor, k_c1: Tensor, k_c2: Tensor, place: Place, config: SparseConfig
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the rows of q, positions and window scores of one sequence, chunk by chunk."""
    positions = place.positions(q.device)
    wide = wide_dtype(q.dtype)
    k_c1 = pad_windows(k_c1[place.windows].to(wide))
    if config.lse == "approximate":
        k_c2 = pad_windows(k_c2[place.lse_windows].to(wide))
    for chunk in place.chunks(score_bytes(place, q.shape[1], wide, config)):
        rows, at = place.rows(chunk), positions[chunk]
        scores = score(q[rows].to(wide), k_c1, k_c2, at, config)
        yield rows, at, scores[..., : place.num_windows]
