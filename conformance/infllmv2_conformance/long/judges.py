"""Judge sampled rows of a long result with the checks and bounds of all other rules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.checks import (
    check_certificate,
    check_form,
    check_same_bits,
    check_selection,
    check_values,
)
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.masks import competing_blocks, members
from infllmv2_conformance.results import Piece
from infllmv2_reference import select_blocks
from infllmv2_reference.geometry import num_blocks, num_visible_windows
from infllmv2_reference.layout import Span

from .oracle import LongOracle, pool_rows, window_chunks, windows_of_blocks
from .rows import rows_to_judge

Note = Callable[[Tensor], None]


@dataclass(frozen=True)
class Part:
    """Hold one sequence's part of a result, and what it is judged by.

    Args:
        piece: what was returned for the sequence.
        span: the sequence.
        rows: which of its rows are judged.
        oracle: what they must be.
        note: takes the differences over their bounds.
    """

    piece: Piece
    span: Span
    rows: list[int]
    oracle: LongOracle
    note: Note

    @property
    def result(self) -> Tensor:
        """Return the first tensor of the piece, which is always there."""
        assert self.piece[0] is not None
        return self.piece[0]


def judge_rows(
    function: str, pieces: Sequence[Piece], oracle: LongOracle, given: dict[str, Any], note: Note
) -> None:
    """Fail unless the sampled rows of every sequence are right.

    Args:
        function: the contract function.
        pieces: what it returned, for each sequence.
        oracle: what it must be.
        given: what the function was called with.
        note: takes the differences over their bounds.
    """
    for span, piece in zip(oracle.spans, pieces, strict=True):
        rows = [] if function == "compress_keys" else rows_of(oracle, span)
        _JUDGES[function](Part(piece, span, rows, oracle, note), given)


def rows_of(oracle: LongOracle, span: Span) -> list[int]:
    """Return the rows of a sequence that are judged."""
    columns = max((len(pair[0][0]) for pair in oracle.windows), default=0)
    return rows_to_judge(oracle.case, span, len(oracle.inputs.q), columns)


def row_span(span: Span, row: int) -> Span:
    """Return one row as a sequence of its own: a single query, after the keys that it sees."""
    at, seen = span.queries.start + row, span.num_keys - span.num_queries + row + 1
    keys = slice(span.keys.start, span.keys.start + seen)
    return Span(span.sequence, slice(at, at + 1), keys)


@contextmanager
def moved(tokens: Tensor | None = None, **by: int) -> Generator[None]:
    """Let a failure name coordinates of the whole sequence.

    Args:
        tokens: the token that each number of a token stands for, unless it stands for itself.
        by: how far the other coordinates are moved; `kv_head` is written with a space.
    """
    try:
        yield
    except ConformanceFailure as failure:
        where = failure.finding.where
        for name, offset in by.items():
            axis = name.replace("_", " ")
            where[axis] = int(where.get(axis, 0)) + offset
        if tokens is not None:
            where["token"] = int(tokens[int(where["token"])])
        raise


def _windows(part: Part, given: dict[str, Any]) -> None:
    size, stride = given["kernel_size"], given["kernel_stride"]
    oracle, span, what = part.oracle, part.span, "a window is not the mean of its keys"
    for windows, tokens in window_chunks(span.num_keys, size, stride):
        keys = oracle.inputs.k[span.keys][tokens]
        mean = bounds.compress(keys, size, stride, oracle.arithmetic)
        expected = Bounded(mean.value.cpu(), mean.bound.cpu())
        with moved(window=windows.start):
            check_values(what, part.result[windows], expected, span, "windows", part.note)


def _scores(part: Part, _: dict[str, Any]) -> None:
    c = part.oracle.config
    for row, score in part.oracle.scores_at(part.span, part.rows):
        one, what = row_span(part.span, row), "a window's score is wrong"
        seen = num_visible_windows(one.num_keys - 1, c.kernel_size, c.kernel_stride)
        expected = Bounded(score.value[:, None, :seen].cpu(), score.bound[:, None, :seen].cpu())
        actual = part.result[:, row : row + 1, :seen]
        with moved(query=row):
            check_values(what, actual, expected, one, "scores", part.note)


def _block_scores(part: Part, _: dict[str, Any]) -> None:
    for row, expected in part.oracle.block_scores_at(part.span, part.rows):
        one, what = row_span(part.span, row), "a block's score is wrong"
        actual = part.result[:, row : row + 1, : expected.value.shape[-1]]
        mask = competing_blocks(one, part.oracle.config)
        with moved(query=row):
            check_values(what, actual, expected, one, "block_scores", part.note, mask)


def _pooled(part: Part, given: dict[str, Any]) -> None:
    c, what = part.oracle.config, "a block's score is not the highest of its visible windows"
    table = windows_of_blocks(num_blocks(part.span.num_keys, c.block_size), c)
    for row in part.rows:
        one = row_span(part.span, row)
        seen = num_visible_windows(one.num_keys - 1, c.kernel_size, c.kernel_stride)
        blocks = num_blocks(one.num_keys, c.block_size)
        expected = pool_rows(given["scores"][:, one.queries, :seen].cpu(), table[:blocks])
        actual = part.result[:, row : row + 1, :blocks]
        with moved(query=row):
            check_same_bits(what, actual, expected, one, "block_scores")


def _selected(part: Part, given: dict[str, Any]) -> None:
    c = part.oracle.config
    for row in part.rows:
        one, selected = row_span(part.span, row), part.result[:, row : row + 1]
        blocks = num_blocks(one.num_keys, c.block_size)
        scores = given["block_scores"][:, one.queries, :blocks].cpu()
        with moved(query=row):
            check_form(selected, one, c)
            check_selection(selected, select_blocks(scores, one.num_keys, c), one, c)


def _fused_selected(part: Part, _: dict[str, Any]) -> None:
    _check_selections(part, part.result, end_to_end=False)


def _attended(part: Part, given: dict[str, Any]) -> None:
    selected = given["selected"][:, part.span.queries]
    for row in part.rows:
        _check_output(part, row, selected[:, row])


def _attention(part: Part, _: dict[str, Any]) -> None:
    judge_attention(part, part.oracle.config.is_sparse(part.span.num_keys))


def judge_attention(part: Part, sparse: bool) -> None:
    """Fail unless rows of `attention` or `decode` are right.

    Output and LSE are judged against the implementation's own selection. Where it does not return
    one, only rows are judged whose selection is certain.
    """
    oracle, span = part.oracle, part.span
    if not sparse:
        for row in part.rows:
            last = (span.num_keys - span.num_queries + row) // oracle.config.block_size
            _check_output(part, row, torch.arange(last + 1).expand(oracle.case.kv_heads, -1))
    elif part.piece[2] is None:
        for row, scores in oracle.block_scores_at(span, part.rows, end_to_end=True):
            one = row_span(span, row)
            selected = select_blocks(scores.value, one.num_keys, oracle.config)
            if _is_certain(selected, scores, one, oracle):
                _check_output(part, row, selected[:, 0])
    else:
        selected = part.piece[2]
        _check_selections(part, selected, end_to_end=True)
        for row in part.rows:
            _check_output(part, row, selected[:, row])


def _check_selections(part: Part, selected: Tensor, *, end_to_end: bool) -> None:
    oracle, span = part.oracle, part.span
    for row in part.rows:
        with moved(query=row):
            check_form(selected[:, row : row + 1], row_span(span, row), oracle.config)
    for row, scores in oracle.block_scores_at(span, part.rows, end_to_end):
        mine, one = selected[:, row : row + 1], row_span(span, row)
        with moved(query=row):
            part.note(check_certificate(mine, scores, one, oracle.config))


def _check_output(part: Part, row: int, selected: Tensor) -> None:
    one, cut = row_span(part.span, row), slice(row, row + 1)
    expected_out, expected_lse = part.oracle.attend_at(part.span, row, selected)
    lse = part.piece[1]
    with moved(query=row):
        if lse is not None:
            check_values("the LSE is wrong", lse[cut], expected_lse, one, "lse", part.note)
        check_values("the output is wrong", part.result[cut], expected_out, one, "out", part.note)


def _is_certain(selected: Tensor, scores: Bounded, one: Span, oracle: LongOracle) -> bool:
    """Say whether no other selection than this one passes the certificate."""
    competing = competing_blocks(one, oracle.config)
    chosen = members(selected, scores.value.shape[-1])
    low = (scores.value - scores.bound).where(chosen & competing, torch.inf).amin(-1)
    high = (scores.value + scores.bound).where(~chosen & competing, -torch.inf).amax(-1)
    return bool(((low > high) | ~(~chosen & competing).any(-1)).all())


_JUDGES: dict[str, Callable[[Part, dict[str, Any]], None]] = {
    "compress_keys": _windows,
    "score_windows": _scores,
    "pool_blocks": _pooled,
    "select_blocks": _selected,
    "score_blocks": _block_scores,
    "select": _fused_selected,
    "attend": _attended,
    "attention": _attention,
}
