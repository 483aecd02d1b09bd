"""How much neighbouring queries share: the union of their selections."""

from __future__ import annotations

import torch
from torch import Tensor

_FLAGS = 1 << 27


def mean_union(selected: Tensor, neighbours: int) -> float:
    """Return the mean number of blocks in the union of `neighbours` consecutive selections.

    Only groups of queries whose first has a full budget count, unless there are none.

    >>> selected = torch.tensor([[[0, 1], [0, 2], [1, 3], [1, 3]]], dtype=torch.int32)
    >>> mean_union(selected, 2)
    2.5

    Args:
        selected: int32 `[HK, T, K]`, ascending, then -1.
        neighbours: how many queries make a group.
    """
    heads, queries, _ = selected.shape
    groups = queries // neighbours
    if groups == 0:
        return float("nan")
    grouped = selected[:, : groups * neighbours].unflatten(1, (groups, neighbours))
    full = grouped[:, :, 0, -1] >= 0  # [HK, groups]
    blocks = int(selected.max()) + 1
    counts: list[Tensor] = []
    step = max(1, _FLAGS // (heads * (blocks + 1)))
    for start in range(0, groups, step):
        part = grouped[:, start : start + step].flatten(2).long()  # [HK, groups, neighbours * K]
        flags = torch.zeros(*part.shape[:2], blocks + 1, dtype=torch.bool, device=selected.device)
        flags.scatter_(2, part.where(part >= 0, blocks), True)
        counts.append(flags[..., :blocks].sum(-1))
    union = torch.cat(counts, dim=1).double()
    return float(union[full].mean() if bool(full.any()) else union.mean())
