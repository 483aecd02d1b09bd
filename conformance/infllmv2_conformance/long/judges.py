"""Judge sampled rows of a long result with the checks and bounds of all other rules."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
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

Note = Callable[[float], None]


def judge_rows(
    function: str, pieces: Sequence[Piece], oracle: LongOracle, given: dict[str, Any], note: Note
) -> None:
    """Fail unless the sampled rows of every sequence are right.

    Args:
        function: the contract function.
        pieces: what it returned, for each sequence.
        oracle: what it must be.
        given: what the function was called with.
        note: takes the worst difference over its bound.
    """
    for span, piece in zip(oracle.spans, pieces, strict=True):
        rows = [] if function == "compress_keys" else rows_of(oracle, span)
        _JUDGES[function](piece, span, rows, oracle, given, note)


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


def _windows(
    piece: Piece,
    span: Span,
    _: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    size, stride = given["kernel_size"], given["kernel_stride"]
    keys, what = oracle.inputs.k[span.keys], "a window is not the mean of its keys"
    for windows, tokens in window_chunks(span.num_keys, size, stride):
        mean = bounds.compress(keys[tokens], size, stride, oracle.arithmetic)
        expected = Bounded(mean.value.cpu(), mean.bound.cpu())
        with moved(window=windows.start):
            check_values(what, _t(piece[0])[windows], expected, span, "windows", note)


def _scores(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    kernel = oracle.config.kernel_size, oracle.config.kernel_stride
    for row, score in oracle.scores_at(span, rows):
        one = row_span(span, row)
        seen = num_visible_windows(one.num_keys - 1, *kernel)
        expected = Bounded(score.value[:, None, :seen].cpu(), score.bound[:, None, :seen].cpu())
        actual = _t(piece[0])[:, row : row + 1, :seen]
        with moved(query=row):
            check_values("a window's score is wrong", actual, expected, one, "scores", note)


def _block_scores(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    for row, expected in oracle.block_scores_at(span, rows):
        one = row_span(span, row)
        actual = _t(piece[0])[:, row : row + 1, : expected.value.shape[-1]]
        mask = competing_blocks(one, oracle.config)
        what = "a block's score is wrong"
        with moved(query=row):
            check_values(what, actual, expected, one, "block_scores", note, mask)


def _pooled(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    c, what = oracle.config, "a block's score is not the highest of its visible windows"
    table = windows_of_blocks(num_blocks(span.num_keys, c.block_size), c)
    for row in rows:
        one = row_span(span, row)
        seen = num_visible_windows(one.num_keys - 1, c.kernel_size, c.kernel_stride)
        blocks = num_blocks(one.num_keys, c.block_size)
        scores = given["scores"][:, one.queries, :seen].cpu()
        expected = pool_rows(scores, table[:blocks])
        actual = _t(piece[0])[:, row : row + 1, :blocks]
        with moved(query=row):
            check_same_bits(what, actual, expected, one, "block_scores")


def _selected(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    for row in rows:
        one, selected = row_span(span, row), _t(piece[0])[:, row : row + 1]
        blocks = num_blocks(one.num_keys, oracle.config.block_size)
        scores = given["block_scores"][:, one.queries, :blocks].cpu()
        with moved(query=row):
            check_form(selected, one, oracle.config)
            check_selection(selected, select_blocks(scores, one.num_keys, oracle.config), one)


def _fused_selected(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    _check_selections(_t(piece[0]), span, rows, oracle, note, end_to_end=False)


def _attended(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    selected = given["selected"][:, span.queries]
    for row in rows:
        _check_output(piece, span, row, selected[:, row], oracle, note)


def _attention(
    piece: Piece,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    given: dict[str, Any],
    note: Note,
) -> None:
    judge_attention(piece, span, rows, oracle, note, oracle.config.is_sparse(span.num_keys))


def judge_attention(
    piece: Piece, span: Span, rows: list[int], oracle: LongOracle, note: Note, sparse: bool
) -> None:
    """Fail unless rows of `attention` or `decode` are right.

    Output and LSE are judged against the implementation's own selection. Where it does not return
    one, only rows are judged whose selection is certain.
    """
    if not sparse:
        for row in rows:
            last = (span.num_keys - span.num_queries + row) // oracle.config.block_size
            every = torch.arange(last + 1).expand(oracle.case.kv_heads, -1)
            _check_output(piece, span, row, every, oracle, note)
    elif piece[2] is None:
        for row, scores in oracle.block_scores_at(span, rows, end_to_end=True):
            one = row_span(span, row)
            selected = select_blocks(scores.value, one.num_keys, oracle.config)
            if _is_certain(selected, scores, one, oracle):
                _check_output(piece, span, row, selected[:, 0], oracle, note)
    else:
        selected = piece[2]
        _check_selections(selected, span, rows, oracle, note, end_to_end=True)
        for row in rows:
            _check_output(piece, span, row, selected[:, row], oracle, note)


def _check_selections(
    selected: Tensor,
    span: Span,
    rows: list[int],
    oracle: LongOracle,
    note: Note,
    *,
    end_to_end: bool,
) -> None:
    for row in rows:
        with moved(query=row):
            check_form(selected[:, row : row + 1], row_span(span, row), oracle.config)
    for row, scores in oracle.block_scores_at(span, rows, end_to_end):
        mine, one = selected[:, row : row + 1], row_span(span, row)
        with moved(query=row):
            note(check_certificate(mine, scores, one, oracle.config))


def _check_output(
    piece: Piece, span: Span, row: int, selected: Tensor, oracle: LongOracle, note: Note
) -> None:
    one, cut = row_span(span, row), slice(row, row + 1)
    out, lse = oracle.attend_at(span, row, selected)
    with moved(query=row):
        if piece[1] is not None:
            check_values("the LSE is wrong", piece[1][cut], lse, one, "lse", note)
        check_values("the output is wrong", _t(piece[0])[cut], out, one, "out", note)


def _is_certain(selected: Tensor, scores: Bounded, one: Span, oracle: LongOracle) -> bool:
    """Say whether no other selection than this one passes the certificate."""
    competing = competing_blocks(one, oracle.config)
    chosen = members(selected, scores.value.shape[-1])
    low = (scores.value - scores.bound).where(chosen & competing, torch.inf).amin(-1)
    high = (scores.value + scores.bound).where(~chosen & competing, -torch.inf).amax(-1)
    return bool(((low > high) | ~(~chosen & competing).any(-1)).all())


def _t(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


_JUDGES: dict[str, Callable[..., None]] = {
    "compress_keys": _windows,
    "score_windows": _scores,
    "pool_blocks": _pooled,
    "select_blocks": _selected,
    "score_blocks": _block_scores,
    "select": _fused_selected,
    "attend": _attended,
    "attention": _attention,
}
