"""Stage 5: attend the tokens of the selected blocks; and dense attention, its special case."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .geometry import first_position


def attend_blocks(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    selected: Int[Tensor, "HK T K"],
    block_size: int,
) -> tuple[Float[Tensor, "T HQ D"], Float[Tensor, "T HQ"]]:
    """Attend, for every query, the tokens up to its position in the blocks that it selected.

    `out[t, h] = sum over j of softmax_j(scale * q[t, h] . k[j, h // G]) v[j, h // G]`, with `j`
    running over the tokens `j <= p` of the blocks `selected[h // G, t]`.

    Args:
        q: the queries of one sequence, aligned with its last keys.
        k: the keys of the sequence.
        v: the values of the sequence.
        selected: block indices, ascending, then -1; a constant: no gradient flows through it.
        block_size: B, tokens of one block.

    Returns:
        The output in the dtype of `q`, and the natural logarithm of each softmax's denominator in
        float32 or wider. A row with nothing to attend has output 0 and LSE -inf.

    Free: order of summation; the dtype of the softmax's numerators, if declared.

    Source: Eq. 1; the scale is decision D1.
    """
    mask = causal_mask(len(q), len(k), q.device) & _selected_tokens(selected, len(k), block_size)
    return _attend_masked(q, k, v, mask)  # mask: [HK, T, S]


def attend_dense(
    q: Float[Tensor, "T HQ D"], k: Float[Tensor, "S HK D"], v: Float[Tensor, "S HK D"]
) -> tuple[Float[Tensor, "T HQ D"], Float[Tensor, "T HQ"]]:
    """Attend, for every query, all tokens up to its position.

    Args, Returns and Free are those of `attend_blocks`; it with every visible block selected gives
    the same (decision D8).
    """
    mask = causal_mask(len(q), len(k), q.device)  # [T, S]
    return _attend_masked(q, k, v, mask.expand(k.shape[1], -1, -1))


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """Say which tokens `j` are not after each query's position `p`: `j <= p`."""
    tokens = torch.arange(num_keys, device=device)
    positions = tokens[first_position(num_queries, num_keys) :]
    return tokens <= positions[:, None]


def _selected_tokens(
    selected: Int[Tensor, "HK T K"], num_keys: int, block_size: int
) -> Bool[Tensor, "HK T S"]:
    """Say which tokens lie in a selected block."""
    blocks = torch.arange(num_keys, device=selected.device) // block_size  # [S]
    return (selected[..., None] == blocks).any(dim=2)


def _attend_masked(
    q: Float[Tensor, "T HQ D"],
    k: Float[Tensor, "S HK D"],
    v: Float[Tensor, "S HK D"],
    mask: Bool[Tensor, "HK T S"],
) -> tuple[Float[Tensor, "T HQ D"], Float[Tensor, "T HQ"]]:
    """Return softmax attention over the tokens that `mask` admits, and its LSE."""
    group, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))  # [S, HQ, D]
    logits = torch.einsum("thd,shd->hts", q.to(wide), k) * head_dim**-0.5  # [HQ, T, S]
    mask = mask.repeat_interleave(group, dim=0)  # [HQ, T, S]
    empty = ~mask.any(dim=-1, keepdim=True)  # [HQ, T, 1]
    logits = logits.masked_fill(~mask, -torch.inf).masked_fill(empty, 0.0)  # no row without terms
    weights = logits.softmax(dim=-1).masked_fill(empty, 0.0)  # [HQ, T, S]
    lse = logits.logsumexp(dim=-1, keepdim=True).masked_fill(empty, -torch.inf)  # [HQ, T, 1]
    out = torch.einsum("hts,shd->thd", weights, v)  # [T, HQ, D]
    return out.to(q.dtype), lse.squeeze(-1).T
