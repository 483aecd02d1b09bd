"""Which rows of a long call are judged: those where something changes, and some at random."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from infllmv2_conformance.cases import Case
from infllmv2_reference.layout import Span

LIMITS = (1 << 31, 1 << 32)
"""Where signed and unsigned 32-bit offsets end, counted in elements and in bytes."""
CORNERS = 40
DRAWN = 20


def rows_to_judge(case: Case, span: Span, total_q: int, windows: int) -> list[int]:
    """Return rows of a sequence, ascending, counted from its first query.

    Always among them: the first and the last row, and the rows on both sides of a 32-bit limit of
    the offsets into q and out `[total_q, HQ, D]`, scores `[HK, total_q, C]` and selections
    `[HK, total_q, K]`. Of the other corners (ends of windows and blocks, the budget, powers of
    two), and of all rows, some are drawn.

    Args:
        case: the case; `choice` says which rows are drawn.
        span: the sequence.
        total_q: queries of the whole batch.
        windows: C, columns of the scores of windows.
    """
    rows = span.num_queries
    if rows == 0:
        return []
    start = span.num_keys - rows
    generator = torch.Generator().manual_seed(case.choice * 131 + span.sequence)
    must = {0, rows - 1, *_at_limits(case, span, total_q, windows)}
    corners = sorted({p - start for p in _corner_positions(case, span)} - must)
    corners = [row for row in corners if 0 <= row < rows]
    picked = torch.randperm(len(corners), generator=generator)[:CORNERS].tolist()
    drawn = torch.randint(rows, (min(DRAWN, rows),), generator=generator).tolist()
    return sorted({*must, *(corners[i] for i in picked), *drawn})


def _corner_positions(case: Case, span: Span) -> Iterable[int]:
    """Yield positions around which what a query sees or must select changes."""
    c, last = case.config, span.num_keys - 1
    block, budget = c.block_size, c.budget
    edges = [n * block for n in (1, c.init_blocks, c.local_blocks, budget, budget + 1)]
    edges += [(c.init_blocks + c.local_blocks) * block, (last // block) * block]
    for size, stride in (
        (c.kernel_size, c.kernel_stride),
        (c.lse_kernel_size, c.lse_kernel_stride),
    ):
        ends = (size - 1, size - 1 + stride, size - 1 + (last - size + 1) // stride * stride)
        edges += [end for end in ends if end <= last]
    edges += [2**k for k in range(max(last, 1).bit_length())]
    edges += [2**k * block for k in range(max(last // block, 1).bit_length())]
    edges += [c.dense_len, span.num_keys - span.num_queries]
    return [p for edge in edges for p in (edge - 1, edge, edge + 1)]


def _at_limits(case: Case, span: Span, total_q: int, windows: int) -> set[int]:
    """Return rows just below and above a limit of some tensor's offsets."""
    item = torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()
    blocks = -(-span.num_keys // case.block_size)
    first = span.queries.start
    found: set[int] = set()
    for width, size, heads in (
        (case.query_heads * case.head_dim, item, 1),
        (windows, 4, case.kv_heads),
        (blocks, 4, case.kv_heads),
        (case.config.budget, 4, case.kv_heads),
    ):
        for limit in (*LIMITS, *(n // size for n in LIMITS)):
            for flat in _crossings(width, total_q * heads, limit):
                found |= {flat % total_q - first - 1, flat % total_q - first}
    return {row for row in found if 0 <= row < span.num_queries}


def _crossings(width: int, rows: int, limit: int) -> list[int]:
    """Return the first rows whose elements lie behind a multiple of `limit`, at most four."""
    if width == 0:
        return []
    multiples = range(limit, rows * width, limit)
    return [-(-n // width) for n in multiples[:4]]
