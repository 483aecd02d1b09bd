"""Stage 2: score the windows for every query, summed over the heads of a group."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .config import SparseConfig
from .geometry import first_position, num_visible_windows, num_windows


def score_windows(
    q: Float[Tensor, "T HQ D"],
    k_c1: Float[Tensor, "C HK D"],
    k_c2: Float[Tensor, "C2 HK D"],
    num_keys: int,
    config: SparseConfig,
) -> Float[Tensor, "HK T C"]:
    """Score every window of K_C1 for every query and key/value head.

    `score[c] = sum over the heads h of the group of exp(logit[h, c] - lse[h])`, where `lse` is the
    logsumexp of the same head's logits over the visible windows of K_C1 (exact) or of K_C2
    (approximate, decision D3).

    Args:
        q: the queries of one sequence, aligned with its last keys.
        k_c1: the windows of (l1, s1) over all keys of the sequence.
        k_c2: the windows of (l2, s2); read only when `config.lse` is "approximate".
        num_keys: S, the key tokens of the sequence.
        config: window lengths and strides, and which normaliser.

    Returns:
        Float32 or wider scores, 0 or more; -inf where the window is not visible to the query; 0 in
        a row that sees no window of the normaliser (decision D4).

    Free: order of summation; the storage dtype, if declared; what stands at invisible windows.

    Source: Eq. 5, 6 and 8, Algorithm 1; the scale is decision D1.
    """
    num_queries, num_kv_heads = len(q), k_c1.shape[1]
    visible = visible_windows(num_queries, num_keys, config.kernel_size, config.kernel_stride)
    visible = visible.to(q.device)  # [T, C]
    logits = _logits(q, k_c1).masked_fill(~visible, -torch.inf)  # [HQ, T, C]
    if config.lse == "exact":
        lse = logits.logsumexp(dim=-1, keepdim=True)  # [HQ, T, 1]
    else:
        lse = _approximate_lse(q, k_c2, num_keys, config)  # [HQ, T, 1]
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # no normaliser: exp(logit - inf) = 0
    per_head = (logits - lse).exp()  # [HQ, T, C]
    scores = per_head.unflatten(0, (num_kv_heads, -1)).sum(dim=1)  # [HK, T, C]
    return scores.masked_fill(~visible, -torch.inf)


def visible_windows(
    num_queries: int, num_keys: int, kernel_size: int, kernel_stride: int
) -> Bool[Tensor, "T C"]:
    """Say which windows have ended by each query's position: `c*s + l - 1 <= p` (decision D2).

    >>> visible_windows(num_queries=3, num_keys=6, kernel_size=4, kernel_stride=2).int()
    tensor([[1, 0],
            [1, 0],
            [1, 1]], dtype=torch.int32)
    """
    positions = range(first_position(num_queries, num_keys), num_keys)
    counts = [num_visible_windows(p, kernel_size, kernel_stride) for p in positions]
    windows = torch.arange(num_windows(num_keys, kernel_size, kernel_stride))
    return windows < torch.tensor(counts, dtype=torch.int64).reshape(-1, 1)


def _approximate_lse(
    q: Float[Tensor, "T HQ D"], k_c2: Float[Tensor, "C2 HK D"], num_keys: int, config: SparseConfig
) -> Float[Tensor, "HQ T 1"]:
    """Return the logsumexp over the visible windows of K_C2, uncorrected (decision D3)."""
    size, stride = config.lse_kernel_size, config.lse_kernel_stride
    visible = visible_windows(len(q), num_keys, size, stride).to(q.device)  # [T, C2]
    logits = _logits(q, k_c2).masked_fill(~visible, -torch.inf)  # [HQ, T, C2]
    return logits.logsumexp(dim=-1, keepdim=True)


def _logits(q: Float[Tensor, "T HQ D"], k_c: Float[Tensor, "C HK D"]) -> Float[Tensor, "HQ T C"]:
    """Return `scale * q . k` per query head, with head h reading kv head `h // G`."""
    group, head_dim = q.shape[1] // k_c.shape[1], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k_per_head = k_c.to(wide).repeat_interleave(group, dim=1)  # [C, HQ, D]
    return torch.einsum("thd,chd->htc", q.to(wide), k_per_head) * head_dim**-0.5
