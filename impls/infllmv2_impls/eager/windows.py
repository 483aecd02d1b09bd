"""Stages 1 and 2 for one sequence: window means by doubling, scores by matmul over query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_reference.config import SparseConfig
from infllmv2_reference.geometry import num_windows

from .places import CHUNK_BYTES, Place, wide_dtype


def compress(keys: Tensor, size: int, stride: int, first: int = 0) -> Tensor:
    """Return the means of the windows from index `first` on, `[C - first, HK, D]` of `[S, HK, D]`.

    Sums of 1, 2, 4 ... tokens are built from one another, and a window is put together from the
    powers of two in its length. Its bits depend on its own keys alone, wherever a chunk begins.

    Source: Eq. 4.
    """
    end = num_windows(len(keys), size, stride)
    means = keys.new_empty(max(0, end - first), *keys.shape[1:])
    wide = wide_dtype(keys.dtype)
    row_bytes = 4 * wide.itemsize * max(1, keys[:1].numel())
    step = max(1, (CHUNK_BYTES // row_bytes - size) // stride)
    for start in range(first, end, step):
        stop = min(start + step, end)
        tokens = keys[start * stride : (stop - 1) * stride + size].to(wide)
        means[start - first : stop - first] = _sliding_sums(tokens, size)[::stride] / size
    return means


def _sliding_sums(rows: Tensor, size: int) -> Tensor:
    """Return the sums of every `size` adjacent rows, pairwise: `[n - size + 1, ...]`."""
    count = len(rows) - size + 1
    total, offset, power, sums = None, 0, 1, rows
    while True:
        if size & power:
            part = sums[offset : offset + count]
            total = part if total is None else total + part
            offset += power
        if 2 * power > size:
            assert total is not None
            return total
        sums = sums[:-power] + sums[power:]  # of 2 * power rows
        power *= 2


def score(q: Tensor, k_c1: Tensor, k_c2: Tensor, positions: Tensor, config: SparseConfig) -> Tensor:
    """Score the windows `[C, HK, D]` and `[C2, HK, D]` for query rows `[t, HQ, D]`: `[HK, t, C]`.

    All in the dtype that sums are taken in; windows behind the last complete one are invisible.
    Invisible windows get -inf, and rows without a visible window of the normaliser 0.

    Source: Eq. 5, 6 and 8 (decisions D1-D4).
    """
    logits = _logits(q, k_c1, positions, config.kernel_size, config.kernel_stride)
    if config.lse == "exact":
        normaliser = logits
    else:
        c = config
        normaliser = _logits(q, k_c2, positions, c.lse_kernel_size, c.lse_kernel_stride)
    lse = normaliser.logsumexp(dim=-1, keepdim=True)  # [HK, t, G, 1]
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    per_head = (logits - lse).exp_()  # [HK, t, G, C]
    scores = per_head[:, :, 0].clone()
    for head in range(1, per_head.shape[2]):  # torch.sum sums some columns in another order
        scores += per_head[:, :, head]
    visible = visible_windows(positions, len(k_c1), config.kernel_size, config.kernel_stride)
    return scores.masked_fill_(~visible, -torch.inf)


def pad_windows(windows: Tensor) -> Tensor:
    """Add windows `[C, HK, D]` that no query sees, up to a multiple of 16.

    BLAS multiplies the columns at a ragged edge in another order than the rest. Without one, equal
    windows get equal scores, bit by bit, and tie as they must (decision D7).
    """
    return torch.nn.functional.pad(windows, (0, 0, 0, 0, 0, -len(windows) % 16))


def visible_windows(positions: Tensor, count: int, size: int, stride: int) -> Tensor:
    """Say which of `count` windows have ended by each position, bool `[t, C]` (decision D2)."""
    ends = torch.arange(count, device=positions.device) * stride + (size - 1)
    return ends <= positions[:, None]


def _logits(q: Tensor, windows: Tensor, positions: Tensor, size: int, stride: int) -> Tensor:
    """Return `scale * q . window`, -inf where invisible: `[HK, t, G, C]`."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = windows.shape[1]
    group = num_heads // num_kv_heads
    rows = q.unflatten(1, (num_kv_heads, group)).transpose(0, 1)  # [HK, t, G, D]
    columns = windows.permute(1, 2, 0)  # [HK, D, C]
    logits = rows.reshape(num_kv_heads, num_rows * group, head_dim) @ columns
    logits = logits.mul_(head_dim**-0.5).view(num_kv_heads, num_rows, group, len(windows))
    visible = visible_windows(positions, len(windows), size, stride)  # [t, C]
    return logits.masked_fill_(~visible[:, None], -torch.inf)


def score_bytes(place: Place, num_heads: int, dtype: torch.dtype, config: SparseConfig) -> int:
    """Estimate the temporary bytes of `score` and `pool` for one query row."""
    overlaps = 1 + -(-config.kernel_size // config.block_size)
    lse_windows = place.lse_windows.stop - place.lse_windows.start
    return 3 * num_heads * dtype.itemsize * (place.num_windows * (1 + overlaps) + lse_windows)
