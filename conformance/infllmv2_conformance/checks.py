"""Compare results with the oracle; every violation names its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import Span

from .bounds import Bounded, dtype_name, rounding
from .failure import fail
from .masks import competing_blocks, forced_blocks, members, positions

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
    note: Callable[[float], None],
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
    ratio = ratio.where(~(bound.isinf() & ~actual.isnan()), 0.0)
    ratio = ratio.where(~(error.isnan() | ratio.isnan()), torch.inf)
    if mask is not None:
        ratio = ratio.where(mask.expand(ratio.shape), 0.0)
    if ratio.numel() == 0:
        return
    worst = ratio.max().item()
    note(worst)
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
            )


def check_selection(selected: Tensor, expected: Tensor, span: Span) -> None:
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
        )


def check_certificate(
    selected: Tensor, scores: Bounded, span: Span, config: SparseConfig, ties: bool = False
) -> float:
    """Fail if a competing block was passed over for one that provably scores less.

    With oracle scores `s` and bounds `e`, every selected competing block `i` and every competing
    block `j` that is not selected must satisfy `s_i + e_i >= s_j - e_j`. With `ties`, of blocks
    with equal scores those with smaller indices must be taken first.

    Returns:
        The worst `(s_j - s_i) / (e_i + e_j)`, at most 1.
    """
    chosen = members(selected.cpu(), scores.value.shape[-1])  # [HK, T, N]
    competing = competing_blocks(span, config)
    value, bound = scores.value, scores.bound
    taken, left = chosen & competing, ~chosen & competing
    if not taken.any() or not left.any():
        return 0.0
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
        )
    if ties:
        _check_ties(value, taken, left, span)
    gap = value.gather(-1, at_j[..., None]) - value.gather(-1, at_i[..., None])
    room = bound.gather(-1, at_i[..., None]) + bound.gather(-1, at_j[..., None])
    ratio = (gap / room).squeeze(-1)
    usable = (weakest < torch.inf) & (strongest > -torch.inf) & ratio.isfinite()
    return float(ratio.where(usable, 0.0).max().clamp(min=0.0))


def _check_ties(value: Tensor, taken: Tensor, left: Tensor, span: Span) -> None:
    """Fail if a block was passed over for a later one of the same score, up to float64 noise."""
    for h, t in (left.any(-1) & taken.any(-1)).nonzero().tolist():
        row = value[h, t]
        weakest = row[taken[h, t]].min()
        tied = (row - weakest).abs() <= 1e-12 * weakest.abs()
        tied |= row == weakest
        last = (tied & taken[h, t]).nonzero().max()
        passed = [b for b in (tied & left[h, t]).nonzero().flatten().tolist() if b < last]
        if passed:
            fail(
                f"block {passed[0]} was passed over for block {int(last)}, which scores the same",
                where=locate((h, t), ("kv head", "query"), span),
                expected=f"of equal scores ({row[passed[0]]:.9g}) the smaller index first",
                actual=f"selected {taken[h, t].nonzero().flatten().tolist()}",
            )
