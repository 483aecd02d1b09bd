"""Arguments of long calls that are not results of earlier stages: scores and selections, drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.arguments import arguments
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import Span

from .oracle import LongOracle

ROWS = 1 << 15
"""Rows of a selection that are drawn at once."""


def long_arguments(function: str, oracle: LongOracle) -> dict[str, Any]:
    """Return the keyword arguments of a stage function for a long case."""
    c, lengths = oracle.config, oracle.inputs.lengths
    if function == "pool_blocks":
        columns = [num_windows(s.num_keys, c.kernel_size, c.kernel_stride) for s in oracle.spans]
        return {"scores": _scores(oracle, columns), **lengths, "config": c}
    if function == "select_blocks":
        columns = [num_blocks(s.num_keys, c.block_size) for s in oracle.spans]
        return {"block_scores": _scores(oracle, columns), **lengths, "config": c}
    if function == "attend":
        names = ("q", "k", "v")
        tensors = {name: getattr(oracle.inputs, name) for name in names}
        selected = draw_selection(oracle)
        return {**tensors, "selected": selected, **lengths, "block_size": c.block_size}
    return arguments(function, oracle.inputs, oracle)


def _scores(oracle: LongOracle, columns: list[int]) -> Tensor:
    """Return random scores `[HK, total_q, max(columns)]`, everywhere, also where none is defined.

    Float32 has 2**24 numbers in [0, 1), so that among thousands of them some tie.
    """
    q = oracle.inputs.q
    shape = (oracle.case.kv_heads, len(q), max(columns, default=0))
    scores = torch.empty(shape, dtype=getattr(torch, oracle.arithmetic.scores), device=q.device)
    return scores.uniform_(generator=_generator(oracle, 0))


def draw_selection(oracle: LongOracle) -> Tensor:
    """Draw visible blocks for every row, int32 `[HK, total_q, K]`: ascending, then -1.

    The blocks that a row sees are cut into K runs, and one is taken of each, so that the whole
    context is read. In half of the rows the last is the query's own, and a quarter of the rows
    takes fewer blocks, some none.
    """
    heads, q = oracle.case.kv_heads, oracle.inputs.q
    shape = (heads, len(q), oracle.config.budget)
    selected = torch.full(shape, -1, dtype=torch.int32, device=q.device)
    for span in oracle.spans:
        for first in range(0, span.num_queries, ROWS):
            rows = slice(first, min(first + ROWS, span.num_queries))
            at = slice(span.queries.start + rows.start, span.queries.start + rows.stop)
            selected[:, at] = _draw_rows(oracle, span, rows)
    return selected


def _draw_rows(oracle: LongOracle, span: Span, rows: slice) -> Tensor:
    """Draw the blocks of some rows of a sequence."""
    device, budget = oracle.inputs.q.device, oracle.config.budget
    generator = _generator(oracle, 1 + span.queries.start + rows.start)
    shape = (oracle.case.kv_heads, rows.stop - rows.start, budget)

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, device=device)

    first = span.num_keys - span.num_queries
    own = torch.arange(first + rows.start, first + rows.stop, device=device)
    own = own.div(oracle.config.block_size, rounding_mode="floor")[:, None]  # [t, 1]
    slots = torch.arange(budget, device=device)
    edges = slots * (own + 1) // budget  # [t, K]
    width = (slots + 1) * (own + 1) // budget - edges
    blocks = edges + (uniform(*shape) * width).long().clamp(max=width - 1)
    keeps_own = (slots == budget - 1) & (uniform(*shape[:2], 1) < 0.5)
    blocks = torch.where(keeps_own, own, blocks)
    blocks = torch.where(own < budget, slots.where(slots <= own, -1), blocks)  # sees too few
    few = uniform(*shape[:2], 1) < 0.25
    limit = torch.where(few, (uniform(*shape[:2], 1) * (budget + 1)).long(), budget)
    return blocks.where(slots < limit, -1).int()


def _generator(oracle: LongOracle, number: int) -> torch.Generator:
    seed = (oracle.case.seed * 7919 + oracle.case.choice) * 1_000_003 + number
    return torch.Generator(oracle.inputs.q.device).manual_seed(seed)
