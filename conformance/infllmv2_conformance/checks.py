"""Compare results with the oracle; every violation names its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig, select_blocks
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import Span

from .bounds import Bounded, dtype_name, rounding
from .failure import Picture, fail
from .margins import NOT_COMPARED
from .masks import competing_blocks, forced_blocks, members, positions
from .pictures import error_map, selection_map

AXES = {
    "windows": ("window", "kv head", "channel"),
    "scores": ("kv head", "query", "window"),
    "block_scores": ("kv head", "query", "block"),
    "out": ("query", "head", "channel"),
    "lse": ("query", "head"),
    "q": ("query", "head", "channel"),
    "k": ("token", "kv head", "channel"),
    "v": ("token", "kv head", "channel"),
}
"""The names of the axes of each kind of result, for one sequence."""


def locate(index: tuple[int, ...], axes: tuple[str, ...], span: Span) -> dict[str, int | str]:
    """Turn an index into coordinates; a query is named by its row and its position."""
    where: dict[str, int | str] = {"sequence": span.sequence}
    for axis, value in zip(axes, index, strict=True):
        if axis == "query":
            where["position"] = span.num_keys - span.num_queries + value
        where[axis] = value
    return where


def check_values(
    what: str,
    actual: Tensor,
    expected: Bounded,
    span: Span,
    kind: str,
    note: Callable[[Tensor], None],
    mask: Tensor | None = None,
) -> None:
    """Fail unless `|actual - expected.value| <= expected.bound` wherever `mask` holds.

    Infinities must be the same infinity. NaN is never right. An infinite bound admits any number.

    What is noted is how much of its room an implementation uses: rounding the result to its dtype
    may cost half a unit in the last place, whatever was done before, so that half unit is taken
    off both the error and the bound.
    """
    value, bound = expected.value, expected.bound
    storage = torch.minimum(rounding(value.abs(), dtype_name(actual)), bound)
    actual = actual.detach().cpu().double()
    error = (actual - value).abs().where(actual != value, 0.0)
    ratio = (error - storage) / (bound - storage)
    ratio = ratio.where(error > storage, 0.0)  # 0 / 0 where both are exact
    ratio = ratio.where(~(bound.isinf() & ~actual.isnan()), NOT_COMPARED)
    ratio = ratio.where(~(error.isnan() | ratio.isnan()), torch.inf)
    if mask is not None:
        ratio = ratio.where(mask.expand(ratio.shape), NOT_COMPARED)
    if ratio.numel() == 0:
        return
    note(ratio)
    worst = ratio.max().item()
    if worst > 1:
        flat = int(ratio.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), ratio.shape))
        fail(
            what,
            where=locate(index, AXES[kind], span),
            expected=repr(value[index].item()),
            actual=repr(actual[index].item()),
            bound=bound[index].item(),
            ratio=worst,
            count=int((ratio > 1).sum()),
            pictures=[lambda: error_map(ratio, AXES[kind], span)],
        )


def check_same_bits(
    what: str,
    actual: Tensor,
    expected: Tensor,
    span: Span,
    kind: str,
    mask: Tensor | None = None,
) -> None:
    """Fail unless both are equal in every bit that matters: values, infinities, NaN nowhere."""
    exact = Bounded(expected.detach().cpu().double(), torch.zeros(expected.shape).double())
    check_values(what, actual, exact, span, kind, lambda _: None, mask)


def check_form(selected: Tensor, span: Span, config: SparseConfig) -> None:
    """Fail unless the rows of `selected` `[HK, T, K]` are well-formed selections."""
    own = (positions(span) // config.block_size)[:, None]  # [T, 1]
    blocks = num_blocks(span.num_keys, config.block_size)
    ids = selected.cpu()
    real = ids >= 0
    rises = (ids[..., 1:] > ids[..., :-1]) | ~real[..., 1:]
    count = (own + 1).clamp(max=config.budget).squeeze(-1)  # [T]
    in_range = ids.where((ids >= 0) & (ids < blocks), -1)
    forced = forced_blocks(span, config)
    problems = (
        ("a block behind the query's own is selected", (ids > own).any(-1)),
        ("an index is below -1", (ids < -1).any(-1)),
        ("an index follows -1", (real[..., 1:] & ~real[..., :-1]).any(-1)),
        ("the indices do not ascend strictly", (~rises).any(-1)),
        ("a forced block is missing", (forced & ~members(in_range, blocks)).any(-1)),
        ("the number of selected blocks is wrong", real.sum(-1) != count),
    )
    for what, bad in problems:
        if bad.any():
            index = tuple(int(i) for i in bad.nonzero()[0])
            row = ids[index].tolist()
            must = forced[index[1]].nonzero().flatten().tolist()
            fail(
                what,
                where=locate(index, ("kv head", "query"), span),
                expected=f"{int(count[index[1]])} blocks up to {int(own[index[1]])}, with {must}",
                actual=str(row),
                count=int(bad.sum()),
                pictures=[partial(selection_map, ids.clone(), bad, span, config)],
            )


def check_selection(selected: Tensor, expected: Tensor, span: Span, config: SparseConfig) -> None:
    """Fail unless both selections `[HK, T, K]` are the same."""
    actual = selected.cpu()
    bad = (actual != expected.cpu()).any(-1)
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        ours, theirs = expected[index].tolist(), actual[index].tolist()
        missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        fail(
            f"the selection is not the specified one: misses {missing}, has instead {extra}",
            where=locate(index, ("kv head", "query"), span),
            expected=str(ours),
            actual=str(theirs),
            count=int(bad.sum()),
            pictures=[partial(selection_map, actual.clone(), bad, span, config, expected)],
        )


def check_certificate(
    selected: Tensor, scores: Bounded, span: Span, config: SparseConfig, ties: bool = False
) -> Tensor:
    """Fail if a competing block was passed over for one that provably scores less.

    With oracle scores `s` and bounds `e`, every selected competing block `i` and every competing
    block `j` that is not selected must satisfy `s_i + e_i >= s_j - e_j`. With `ties`, of blocks
    with equal scores those with smaller indices must be taken first.

    Returns:
        The worst `(s_j - s_i) / (e_i + e_j)` of every row, `[HK, T]`, at most 1.
    """
    ids, value, bound = selected.cpu(), scores.value, scores.bound
    taken, left = _taken_and_left(ids, span, config)
    if not taken.any() or not left.any():
        return torch.zeros(0, dtype=torch.float64)
    high, low = value + bound, value - bound
    low = low.where(bound < torch.inf, -torch.inf)
    weakest, at_i = high.where(taken, torch.inf).min(-1)
    strongest, at_j = low.where(left, -torch.inf).max(-1)
    bad = strongest > weakest
    if bad.any():
        h, t = (int(i) for i in bad.nonzero()[0])
        i, j = int(at_i[h, t]), int(at_j[h, t])
        fail(
            f"block {j} was passed over for block {i}, which scores less",
            where=locate((h, t), ("kv head", "query"), span),
            expected=f"block {j} with score {value[h, t, j]:.9g} +- {bound[h, t, j]:.2g}",
            actual=f"block {i} with score {value[h, t, i]:.9g} +- {bound[h, t, i]:.2g}",
            bound=float(bound[h, t, i] + bound[h, t, j]),
            ratio=float((value[h, t, j] - value[h, t, i]) / (bound[h, t, i] + bound[h, t, j])),
            count=int(bad.sum()),
            pictures=[_drawn(ids, value, bad, span, config)],
        )
    if ties:
        _check_ties(ids, value, span, config)
    gap = value.gather(-1, at_j[..., None]) - value.gather(-1, at_i[..., None])
    room = bound.gather(-1, at_i[..., None]) + bound.gather(-1, at_j[..., None])
    ratio = (gap / room).squeeze(-1)
    usable = (weakest < torch.inf) & (strongest > -torch.inf) & ratio.isfinite()
    return ratio.clamp(min=0.0).where(usable, NOT_COMPARED)


def _check_ties(ids: Tensor, value: Tensor, span: Span, config: SparseConfig) -> None:
    """Fail if a block was passed over for a later one of the same score, up to float64 noise."""
    taken, left = _taken_and_left(ids, span, config)
    wrong: dict[tuple[int, int], tuple[int, int]] = {}
    for h, t in (left.any(-1) & taken.any(-1)).nonzero().tolist():
        row = value[h, t]
        weakest = row[taken[h, t]].min()
        tied = (row - weakest).abs() <= 1e-12 * weakest.abs()
        tied |= row == weakest
        last = int((tied & taken[h, t]).nonzero().max())
        first = next(
            (b for b in (tied & left[h, t]).nonzero().flatten().tolist() if b < last), None
        )
        if first is not None:
            wrong[h, t] = first, last
    if wrong:
        (h, t), (first, last) = next(iter(wrong.items()))
        bad = torch.zeros(ids.shape[:2], dtype=torch.bool)
        bad[tuple(zip(*wrong, strict=True))] = True
        fail(
            f"block {first} was passed over for block {last}, which scores the same",
            where=locate((h, t), ("kv head", "query"), span),
            expected=f"of equal scores ({value[h, t, first]:.9g}) the smaller index first",
            actual=f"selected {taken[h, t].nonzero().flatten().tolist()}",
            count=len(wrong),
            pictures=[_drawn(ids, value, bad, span, config)],
        )


def _taken_and_left(ids: Tensor, span: Span, config: SparseConfig) -> tuple[Tensor, Tensor]:
    """Say which competing blocks are selected, and which are not, `[HK, T, N]` each."""
    chosen = members(ids, num_blocks(span.num_keys, config.block_size))
    competing = competing_blocks(span, config)
    return chosen & competing, ~chosen & competing


def _drawn(
    ids: Tensor, value: Tensor, bad: Tensor, span: Span, config: SparseConfig
) -> Callable[[], Picture]:
    """Return what draws a selection beside the one that follows from the oracle's scores."""
    ids = ids.clone()  # an implementation may use its result's memory again
    return lambda: selection_map(
        ids, bad, span, config, select_blocks(value, span.num_keys, config)
    )
