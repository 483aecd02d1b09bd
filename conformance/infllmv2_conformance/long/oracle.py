"""The oracle of single rows: float64 on the device of the inputs, in bounded memory.

A row needs its own query, the windows, and the tokens of the blocks that it selected. Windows are
computed once, in chunks of tokens, and kept in float64; everything else is made for a few rows at a
time and dropped. The numbers are those of `Oracle`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.oracle import Oracle
from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import Span, cu_seqlens_of

TOKENS = 1 << 15
"""Tokens that are compressed at once."""
LOGITS = 1 << 22
"""Logits of windows that are held at once; a score needs about twenty numbers for each."""


class LongOracle(Oracle):
    """Hold what sampled rows must be; whatever is of all rows is not computed."""

    @cached_property
    def windows(self) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Return (K_C1, its slack), (K_C2, its slack) of every sequence, float64 `[C, HK, D]`."""
        c = self.config
        kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
        both = [[self._windows_of(span, *kernel) for kernel in kernels] for span in self.spans]
        return [(first, second) for first, second in both]

    def _windows_of(self, span: Span, size: int, stride: int) -> tuple[Tensor, Tensor]:
        keys = self.inputs.k[span.keys]
        parts = [
            bounds.stored_windows(keys[tokens], size, stride, self.arithmetic)
            for _, tokens in window_chunks(span.num_keys, size, stride)
        ]
        empty = keys[:0].double()
        values, slacks = [empty], [empty]
        for value, slack in parts:
            values.append(value)
            slacks.append(slack)
        return torch.cat(values), torch.cat(slacks)

    def packed_windows(self, which: int) -> tuple[Tensor, Tensor]:
        """Return K_C1 (`which` 0) or K_C2 (1) packed, in the dtype of k, and its cu_seqlens."""
        k = self.inputs.k
        rows = [pair[which][0].to(k.dtype) for pair in self.windows]
        return torch.cat([k[:0], *rows]), cu_seqlens_of([len(r) for r in rows], k.device)

    def scores_at(
        self, span: Span, rows: Sequence[int], end_to_end: bool = False
    ) -> Iterator[tuple[int, Bounded]]:
        """Yield the scores of some rows of a sequence, `[HK, C]` each.

        Args:
            span: the sequence.
            rows: indices of queries, counted from the sequence's first.
            end_to_end: whether the implementation compresses the keys itself.
        """
        (k_c1, slack1), (k_c2, slack2) = self.windows[span.sequence]
        first, second = (k_c1, slack1), (k_c2, slack2)
        if not end_to_end:
            first, second = (k_c1, None), (k_c2, None)
        per_row = self.case.query_heads * max(len(k_c1), len(k_c2), 1)
        step = max(1, LOGITS // per_row)
        queries, start = self.inputs.q[span.queries], span.num_keys - span.num_queries
        for i in range(0, len(rows), step):
            part = torch.tensor(rows[i : i + step], device=queries.device)
            q, at = queries[part], part + start
            score = bounds.scores_at(at, q, first, second, self.config, self.arithmetic)
            for j, row in enumerate(rows[i : i + step]):
                yield row, Bounded(score.value[:, j], score.bound[:, j])

    def block_scores_at(
        self, span: Span, rows: Sequence[int], end_to_end: bool = False
    ) -> Iterator[tuple[int, Bounded]]:
        """Yield the scores of the blocks that a row sees, on the CPU, `[HK, 1, N]` each."""
        table = windows_of_blocks(num_blocks(span.num_keys, self.config.block_size), self.config)
        for row, score in self.scores_at(span, rows, end_to_end):
            position = span.num_keys - span.num_queries + row
            seen = num_blocks(position + 1, self.config.block_size)
            pooled = pool_bounded(score, table[:seen])
            yield row, Bounded(pooled.value[:, None].cpu(), pooled.bound[:, None].cpu())

    def attend_at(self, span: Span, row: int, selected: Tensor) -> tuple[Bounded, Bounded]:
        """Return the output `[1, HQ, D]` and the LSE `[1, HQ]` of one row, on the CPU.

        Args:
            span: the sequence.
            row: index of the query, counted from the sequence's first.
            selected: the blocks it selected, ascending and then -1, `[HK, K]`.
        """
        position = span.num_keys - span.num_queries + row
        outs: list[Bounded] = []
        lses: list[Bounded] = []
        for head in range(self.case.kv_heads):
            tokens, count = self.tokens_of(selected[head], position), (selected[head] >= 0).sum()
            held = tokens if len(tokens) else torch.zeros(1, dtype=torch.int64)  # a masked one
            q, k, v = self._gather(span, row, head, held)
            mask = torch.full((1, 1, 1, len(held)), len(tokens) > 0, device=q.device)
            blocks = torch.full((1, 1, 1), float(count), dtype=torch.float64, device=q.device)
            part = bounds.attend_tokens(q, k, v, mask, blocks, self.arithmetic, self.case.dtype)
            outs.append(part.out)
            lses.append(part.lse)
        return _joined(outs), _joined(lses)

    def tokens_of(self, blocks: Tensor, position: int) -> Tensor:
        """Return the tokens up to `position` in the blocks of one row, with -1 left out."""
        size = self.config.block_size
        starts = blocks[blocks >= 0].long().cpu() * size
        tokens = (starts[:, None] + torch.arange(size)).flatten()
        return tokens[tokens <= position]

    def _gather(
        self, span: Span, row: int, head: int, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return one row and its tokens, of one key/value head: `[1, G, D]`, `[S', 1, D]` twice."""
        group = self.case.group
        q = self.inputs.q[span.queries.start + row, head * group : (head + 1) * group][None]
        tokens = (tokens + span.keys.start).to(q.device)
        heads = slice(head, head + 1)
        return q, self.inputs.k[tokens, heads], self.inputs.v[tokens, heads]


def _joined(heads: list[Bounded]) -> Bounded:
    """Put the key/value heads `[1, G, 1, ...]` side by side: `[1, HQ, ...]`."""
    value = torch.cat([h.value[0] for h in heads]).transpose(0, 1)
    bound = torch.cat([h.bound[0] for h in heads]).transpose(0, 1)
    return Bounded(value.cpu(), bound.cpu())


def window_chunks(num_keys: int, size: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Cut the windows of a sequence into runs, each with the tokens that it covers."""
    count = num_windows(num_keys, size, stride)
    step = max(1, (TOKENS - size) // stride)
    for first in range(0, count, step):
        end = min(first + step, count)
        yield slice(first, end), slice(first * stride, (end - 1) * stride + size)


def windows_of_blocks(blocks: int, config: SparseConfig) -> Tensor:
    """Return the half-open ranges of windows that blocks pool, int64 `[blocks, 2]`."""
    c = config
    starts = torch.arange(blocks) * c.block_size
    if c.pooling == "overlap":
        first = (starts - c.kernel_size).div(c.kernel_stride, rounding_mode="floor") + 1
        end = -(-(starts + c.block_size)).div(c.kernel_stride, rounding_mode="floor")
    else:
        first = starts.div(c.kernel_stride, rounding_mode="floor")
        end = first + (c.block_size + c.kernel_size) // c.kernel_stride - 1
    return torch.stack([first.clamp(min=0), end], dim=-1)


def pool_rows(scores: Tensor, table: Tensor) -> Tensor:
    """Pool scores `[..., C]`, -inf where invisible, by ranges `[N, 2]` of windows: `[..., N]`."""
    count = scores.shape[-1]
    first, end = table[:, 0], table[:, 1].clamp(max=count)
    width = int((table[:, 1] - table[:, 0]).max()) if len(table) else 0
    index = first[:, None] + torch.arange(width)
    index = index.where(index < end[:, None], count).to(scores.device)  # column `count`: none
    padded = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
    return padded[..., index.flatten()].unflatten(-1, index.shape).amax(-1)


def pool_bounded(score: Bounded, table: Tensor) -> Bounded:
    """Bound the highest of the scores that overlap each block, as `bounds.block_scores` does."""
    unbounded = score.bound.isinf()
    value = pool_rows(score.value, table)
    low = pool_rows((score.value - score.bound).masked_fill(unbounded, -torch.inf), table)
    high = pool_rows((score.value + score.bound).masked_fill(unbounded, torch.inf), table)
    bound = torch.maximum(high - value, value - low).masked_fill(high == torch.inf, torch.inf)
    return Bounded(value, bound.masked_fill(value == -torch.inf, 0.0))
