"""The tasks of a forward: every stage, alone and fused, and the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.checks import (
    check_certificate,
    check_form,
    check_same_bits,
    check_selection,
    check_values,
)
from infllmv2_conformance.failure import fail
from infllmv2_conformance.masks import competing_blocks
from infllmv2_reference import pool_blocks, select_blocks
from infllmv2_reference.geometry import num_blocks, num_windows
from infllmv2_reference.layout import Span

from .field import Field
from .sampled import RowOracle, Site, Worst
from .tasks import Task, make_task, require_tensor, require_tuple

Maker = Callable[[Candidate, Field], Task]
Rows = list[tuple[Tensor, ...]]
"""For every site, what the result holds there."""
WIDE = (torch.float32, torch.float64)
_WINDOWS = 16


def _compress(candidate: Candidate, field: Field, which: int) -> Task:
    c, t = field.config, field.tensors
    kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
    size, stride = kernels[which - 1]
    total = num_windows(field.workload.length, size, stride)
    places = sorted({0, total - 1, *range(0, total, max(1, total // _WINDOWS))}) if total else []
    given = {
        "k": field.keys,
        "cu_seqlens_k": t.cu_seqlens_k,
        "max_seqlen_k": t.max_seqlen_k,
        "kernel_size": size,
        "kernel_stride": stride,
    }
    span = Span(0, slice(0, 0), slice(0, field.workload.length))

    def sample(result: Any) -> tuple[Tensor, Tensor]:
        windows, ends = require_tuple(result, 2)
        require_tensor("windows", windows, (None, *t.k.shape[1:]), (t.k.dtype,))
        return windows[places].cpu(), require_tensor("cu_seqlens_c", ends, (2,)).cpu()

    def judge(kept: tuple[Tensor, Tensor]) -> float:
        worst = Worst()
        if kept[1].tolist() != [0, total]:
            fail(
                "the number of windows is wrong", expected=f"{total}", actual=f"{kept[1].tolist()}"
            )
        for i, window in enumerate(places):
            keys = field.keys[window * stride : window * stride + size].cpu()
            must = bounds.compress(keys, size, stride, candidate.capabilities.arithmetic)
            what = "a window is not the mean of its keys"
            check_values(what, kept[0][i : i + 1], must, span, "windows", worst)
        return worst.ratio

    call = partial(candidate.call_unguarded, "compress_keys", **given)
    name = "compress_keys" if which == 1 else "compress_keys[k_c2]"
    return make_task(candidate, field, name, call, sample, judge)


def _rows(field: Field, result: Any, dtypes: tuple[torch.dtype, ...] = ()) -> Rows:
    """Copy the sites' rows of a result `[HK, T, any]`."""
    w = field.workload
    x = require_tensor("rows", result, (w.shape.kv_heads, w.queries, None), dtypes)
    return [(x[:, site.row : site.row + 1].cpu(),) for site in field.sites]


def _row_task(
    candidate: Candidate,
    field: Field,
    function: str,
    given: dict[str, Any],
    check: Callable[[Tensor, Any, Worst, RowOracle], None],
    dtypes: tuple[torch.dtype, ...] = (),
) -> Task:
    """Return a task whose result is judged row by row; `check` takes a row and its site."""

    def judge(kept: Rows) -> float:
        worst, oracle = Worst(), field.oracle(candidate, given_windows="k_c1" in given)
        for site, (row,) in zip(field.sites, kept, strict=True):
            check(row, site, worst, oracle)
        return worst.ratio

    call = partial(candidate.call_unguarded, function, **given)
    return make_task(
        candidate, field, function, call, lambda result: _rows(field, result, dtypes), judge
    )


def _score_windows(candidate: Candidate, field: Field) -> Task:
    def check(row: Tensor, site: Site, worst: Worst, oracle: RowOracle) -> None:
        must = oracle.scores(site, False)
        seen = row[..., : must.value.shape[-1]]
        check_values("a window's score is wrong", seen, must, site.span, "scores", worst)

    return _row_task(candidate, field, "score_windows", field.scoring, check)


def _score_blocks(candidate: Candidate, field: Field) -> Task:
    def check(row: Tensor, site: Site, worst: Worst, oracle: RowOracle) -> None:
        must = oracle.block_scores(site, False)
        seen = row[..., : must.value.shape[-1]]
        mask = competing_blocks(site.span, field.config)
        check_values("a block's score is wrong", seen, must, site.span, "block_scores", worst, mask)

    return _row_task(candidate, field, "score_blocks", field.scoring, check)


def _pool_blocks(candidate: Candidate, field: Field) -> Task:
    given = _stored(candidate, field, field.scores)

    def check(row: Tensor, site: Site, _worst: Worst, _oracle: RowOracle) -> None:
        end = site.position + 1
        seen = num_windows(end, field.config.kernel_size, field.config.kernel_stride)
        scores = given[:, site.row : site.row + 1, :seen].cpu()
        must = pool_blocks(scores, end, field.config)
        what = "a block's score is not the highest of its visible windows"
        check_same_bits(what, row[..., : must.shape[-1]], must, site.span, "block_scores")

    arguments = {"scores": given, **field.tensors.lengths, "config": field.config}
    return _row_task(candidate, field, "pool_blocks", arguments, check)


def _select_blocks(candidate: Candidate, field: Field) -> Task:
    given = _stored(candidate, field, field.block_scores)

    def check(row: Tensor, site: Site, _worst: Worst, _oracle: RowOracle) -> None:
        end = site.position + 1
        blocks = num_blocks(end, field.config.block_size)
        scores = given[:, site.row : site.row + 1, :blocks].cpu()
        check_form(row, site.span, field.config)
        check_selection(row, select_blocks(scores, end, field.config), site.span, field.config)

    arguments = {"block_scores": given, **field.tensors.lengths, "config": field.config}
    return _row_task(candidate, field, "select_blocks", arguments, check, (torch.int32,))


def _stored(candidate: Candidate, field: Field, scores: Tensor) -> Tensor:
    """Return scores in the dtype that the implementation stores them in."""
    dtype = getattr(torch, candidate.capabilities.arithmetic.scores)
    return scores if scores.dtype == dtype else field.swapped(scores.to(dtype), 0)


def _select(candidate: Candidate, field: Field) -> Task:
    def check(row: Tensor, site: Site, worst: Worst, oracle: RowOracle) -> None:
        check_form(row, site.span, field.config)
        scores = oracle.block_scores(site, False)
        worst(check_certificate(row, scores, site.span, field.config))

    return _row_task(candidate, field, "select", field.scoring, check, (torch.int32,))


def sample_output(candidate: Candidate, field: Field, result: Any, parts: int) -> Rows:
    """Copy output, LSE and selection of the sites, as far as they are claimed."""
    claims, q, w = candidate.capabilities, field.tensors.q, field.workload
    values = require_tuple(result, parts)
    out = require_tensor("out", values[0], tuple(q.shape), (q.dtype,))
    lse = selected = None
    if claims.returns_lse:
        lse = require_tensor("lse", values[1], tuple(q.shape[:2]), WIDE)
    if parts == 3 and claims.returns_selection:
        form = w.shape.kv_heads, len(q), w.budget
        selected = require_tensor("selected", values[2], form, (torch.int32,))
    none = torch.empty(0)
    return [
        (
            out[site.row].detach().cpu(),
            none if lse is None else lse[site.row].detach().cpu(),
            none if selected is None else selected[:, site.row : site.row + 1].cpu(),
        )
        for site in field.sites
    ]


def _attend(candidate: Candidate, field: Field) -> Task:
    given = field.attending

    def judge(kept: Rows) -> float:
        worst, oracle = Worst(), field.oracle(candidate)
        for site, (out, lse, _) in zip(field.sites, kept, strict=True):
            blocks = field.selected[:, site.row].cpu()
            oracle.check_output(out, lse if lse.numel() else None, site, blocks, worst)
        return worst.ratio

    call = partial(candidate.call_unguarded, "attend", **given)
    return make_task(
        candidate, field, "attend", call, lambda r: sample_output(candidate, field, r, 2), judge
    )


def _attention(candidate: Candidate, field: Field) -> Task:
    t = field.tensors
    given = {"q": t.q, "k": t.k, "v": t.v, **t.lengths, "config": field.config}
    call = partial(candidate.call_unguarded, "attention", **given)

    def judge(kept: Rows) -> float:
        return judge_whole(kept, field, field.oracle(candidate))

    return make_task(
        candidate, field, "attention", call, lambda r: sample_output(candidate, field, r, 3), judge
    )


def judge_whole(
    kept: Rows, field: Field, oracle: RowOracle, sites: list[Site] | None = None
) -> float:
    """Judge rows of `attention` or `decode`: the selection, and the output by that selection.

    Where no selection is returned, the oracle's own counts, in the rows in which it is certain.
    """
    worst = Worst()
    for site, (out, lse, selected) in zip(sites or field.sites, kept, strict=True):
        scores = oracle.block_scores(site, True)
        if selected.numel():
            check_form(selected, site.span, field.config)
            worst(check_certificate(selected, scores, site.span, field.config))
        else:
            end = site.position + 1
            selected = select_blocks(scores.value, end, field.config)
            if not _is_certain(scores, selected, site, field):
                continue
        oracle.check_output(out, lse if lse.numel() else None, site, selected[:, 0], worst)
    return worst.ratio


def _is_certain(scores: bounds.Bounded, selected: Tensor, site: Site, field: Field) -> bool:
    """Say whether no honest implementation can select anything else."""
    blocks = scores.value.shape[-1]
    chosen = torch.zeros(*selected.shape[:2], blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, selected.long().where(selected >= 0, blocks), True)
    chosen = chosen[..., :blocks]
    competing = competing_blocks(site.span, field.config)
    low = (scores.value - scores.bound).where(chosen & competing, torch.inf).amin(-1)
    high = (scores.value + scores.bound).where(~chosen & competing, -torch.inf).amax(-1)
    return bool(((low > high) | ~(~chosen & competing).any(-1)).all())


STAGES: dict[str, Maker] = {
    "compress_keys": partial(_compress, which=1),
    "compress_keys[k_c2]": partial(_compress, which=2),
    "score_windows": _score_windows,
    "pool_blocks": _pool_blocks,
    "select_blocks": _select_blocks,
    "score_blocks": _score_blocks,
    "select": _select,
    "attend": _attend,
    "attention": _attention,
}
"""How to prepare each function of the forward."""
