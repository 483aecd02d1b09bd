"""Judge the result of a contract function against the oracle: one judge per function."""
# ruff: noqa: ARG001 - all judges have one signature

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig, pool_blocks, select_blocks
from infllmv2_reference.layout import Span
from infllmv2_reference.score import visible_windows

from .bounds import compress
from .checks import (
    check_certificate,
    check_form,
    check_same_bits,
    check_selection,
    check_values,
)
from .masks import competing_blocks, members, visible_blocks
from .oracle import Oracle
from .pictures import attended_map, showing
from .results import Piece

Note = Callable[[Tensor], None]


def judge(
    function: str, piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    """Fail unless one sequence's part of a result is right.

    Args:
        function: the contract function.
        piece: what it returned for the sequence.
        span: the sequence.
        oracle: what it must be.
        arguments: what the function was called with.
        note: takes the differences over their bounds.
    """
    _JUDGES[function](piece, span, oracle, arguments, note)


def _windows(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    size, stride = arguments["kernel_size"], arguments["kernel_stride"]
    expected = compress(oracle.keys(span), size, stride, oracle.arithmetic)
    check_values(
        "a window is not the mean of its keys", _t(piece[0]), expected, span, "windows", note
    )


def _scores(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    visible = defined("score_windows", span, oracle.config)
    expected = oracle.scores[span.sequence]
    check_values("a window's score is wrong", _t(piece[0]), expected, span, "scores", note, visible)


def _pooled(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    windows = len(oracle.windows[span.sequence][0][0])
    scores = arguments["scores"][:, span.queries, :windows].cpu()
    expected = pool_blocks(scores, span.num_keys, oracle.config)
    visible = visible_blocks(span, oracle.config)
    actual = _t(piece[0]).cpu().where(visible, 0.0)
    check_same_bits(
        "a block's score is not the highest of its visible windows",
        actual,
        expected.where(visible, 0.0),
        span,
        "block_scores",
    )


def _selected(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    blocks = -(-span.num_keys // oracle.config.block_size)
    scores = arguments["block_scores"][:, span.queries, :blocks].cpu()
    selected = _t(piece[0])
    check_form(selected, span, oracle.config)
    expected = select_blocks(scores, span.num_keys, oracle.config)
    check_selection(selected, expected, span, oracle.config)


def _block_scores(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    competing = competing_blocks(span, oracle.config)
    expected = oracle.block_scores[span.sequence]
    actual = _t(piece[0])
    check_values(
        "a block's score is wrong", actual, expected, span, "block_scores", note, competing
    )


def _fused_selected(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    selected, scores = _t(piece[0]), oracle.block_scores[span.sequence]
    check_form(selected, span, oracle.config)
    note(check_certificate(selected, scores, span, oracle.config))


def _attended(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    selected = arguments["selected"][:, span.queries].cpu()
    judge_output(piece[0], piece[1], selected, span, oracle, note)


def _attention(
    piece: Piece, span: Span, oracle: Oracle, arguments: dict[str, Any], note: Note
) -> None:
    out, lse, selected = piece
    if not oracle.config.is_sparse(span.num_keys):
        judge_output(out, lse, oracle.everything(span), span, oracle, note)
        return
    if selected is None:
        judge_unseen_selection(out, lse, span, oracle, note)
        return
    check_form(selected, span, oracle.config)
    scores = oracle.end_to_end_block_scores[span.sequence]
    note(check_certificate(selected, scores, span, oracle.config))
    judge_output(out, lse, selected.cpu(), span, oracle, note)


def defined(function: str, span: Span, config: SparseConfig) -> Tensor | None:
    """Say where a function's result is defined by the contract, or None if everywhere."""
    if function == "score_windows":
        size, stride = config.kernel_size, config.kernel_stride
        return visible_windows(span.num_queries, span.num_keys, size, stride)
    if function == "pool_blocks":
        return visible_blocks(span, config)
    return competing_blocks(span, config) if function == "score_blocks" else None


def judge_output(
    out: Tensor | None,
    lse: Tensor | None,
    selected: Tensor,
    span: Span,
    oracle: Oracle,
    note: Note,
    rows: Tensor | None = None,
) -> None:
    """Fail unless output and LSE are those of `selected`; `rows` `[T]` picks some queries."""
    if span.num_queries == 0:
        return
    expected_out, expected_lse = oracle.attend(span, selected)
    with showing(lambda: attended_map(selected, span, oracle.config)):
        mask = None if rows is None else rows[:, None]
        if lse is not None:
            check_values("the LSE is wrong", lse, expected_lse, span, "lse", note, mask)
        mask = None if rows is None else rows[:, None, None]
        check_values("the output is wrong", _t(out), expected_out, span, "out", note, mask)


def judge_unseen_selection(
    out: Tensor | None, lse: Tensor | None, span: Span, oracle: Oracle, note: Note
) -> None:
    """Judge the rows whose selection is certain, for implementations that do not return it."""
    selected = oracle.selected[span.sequence]
    scores = oracle.end_to_end_block_scores[span.sequence]
    competing = competing_blocks(span, oracle.config)
    chosen = members(selected, scores.value.shape[-1])
    low = (scores.value - scores.bound).where(chosen & competing, torch.inf).amin(-1)
    high = (scores.value + scores.bound).where(~chosen & competing, -torch.inf).amax(-1)
    certain = ((low > high) | ~(~chosen & competing).any(-1)).all(0)
    judge_output(out, lse, selected, span, oracle, note, certain)


def _t(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


_JUDGES = MappingProxyType(
    {
        "compress_keys": _windows,
        "score_windows": _scores,
        "pool_blocks": _pooled,
        "select_blocks": _selected,
        "score_blocks": _block_scores,
        "select": _fused_selected,
        "attend": _attended,
        "attention": _attention,
    }
)
