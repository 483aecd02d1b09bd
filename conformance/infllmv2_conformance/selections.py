"""Selections for tests of stage 5, which must work for any, not only for those of stage 4."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_reference.layout import Span

from .arguments import pack_rows
from .masks import visible_blocks
from .oracle import Oracle
from .trial import Trial


def random_selection(
    trial: Trial, span: Span, *, keep_own: bool = True, banned: Tensor | None = None
) -> Tensor:
    """Draw up to the budget of visible blocks for every row, `[HK, T, K]`.

    Args:
        trial: the case, whose budget limits the number, and whose numbers are used.
        span: the sequence.
        keep_own: whether the query's own block, the diagonal, is always among them; without it
            rows may select nothing.
        banned: blocks `[N]` that nobody may select.
    """
    visible = visible_blocks(span, trial.case.config)
    if banned is not None:
        visible = visible & ~banned
    shape = trial.case.kv_heads, *visible.shape
    rank = torch.rand(shape, generator=trial.generator)
    few = torch.rand(shape[:2], generator=trial.generator)[..., None] < 0.3
    rank = rank.where(~few | (rank > 0.7), torch.inf)  # some rows take few blocks
    if keep_own:
        own = torch.arange(span.num_keys - span.num_queries, span.num_keys)
        rank.scatter_(-1, (own // trial.case.block_size).expand(shape[0], -1)[..., None], -1.0)
    rank = rank.where(visible, torch.inf)
    return ascending(rank, trial.case.config.budget)


def ascending(rank: Tensor, budget: int) -> Tensor:
    """Return the `budget` blocks of lowest finite rank `[..., N]`, ascending, then -1."""
    blocks = rank.shape[-1]
    width = max(blocks, budget)
    padded = torch.full((*rank.shape[:-1], width), torch.inf, dtype=rank.dtype)
    padded[..., :blocks] = rank
    order = torch.argsort(padded, dim=-1, stable=True)[..., :budget]
    chosen = order.where(padded.gather(-1, order) < torch.inf, width).sort(-1).values
    return chosen.where(chosen < width, -1).int()


def pack_selected(rows: list[Tensor], oracle: Oracle) -> Tensor:
    """Lay the selections of all sequences end to end, int32 `[HK, total_q, K]`."""
    return pack_rows(rows, oracle, torch.int32, fill=-1)
