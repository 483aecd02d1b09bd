"""Stage 4: forced blocks, then the best-scored ones. Given scores, nothing is left to choice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from infllmv2_conformance.arguments import pack_rows
from infllmv2_conformance.masks import competing_blocks, visible_blocks
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, many_blocks
from infllmv2_conformance.trial import Trial

FUNCTION = "select_blocks"
RELEASED_BUDGET = 96
Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _huge(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw scores near the end of float32: the approximate normaliser knows no limit."""
    return _random(shape, generator) * 1e38


def _few_levels(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw three levels of score, so that most rows have ties at the edge of the budget."""
    return torch.randint(0, 3, shape, generator=generator).double()


def _zeros(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _some_missing(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw scores of which about half are -inf: blocks without a visible window."""
    scores = _random(shape, generator)
    return scores.where(scores > 0.5, -torch.inf)


def _zeros_or_missing(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw zeros, and blocks without a visible window; row by row one zero more, up to all.

    So some rows have just as many zeros as they want blocks, and the least real score is 0.
    """
    heads, rows, blocks = shape
    zeros = (torch.arange(heads)[:, None] + torch.arange(rows)) % (blocks + 1)
    order = _random(shape, generator).argsort(-1).argsort(-1)
    return torch.zeros(shape, dtype=torch.float64).where(order < zeros[..., None], -torch.inf)


@rule("select.exact")
def test_exact(run: Runner) -> None:
    """Compare with the specified selection on random scores, some of them -inf."""
    draws = (_random, _some_missing)

    def check(trial: Trial) -> None:
        _check(trial, draws[trial.case.choice % 2])

    run.cases(cases(run, competing=True), check, weight=0.6)
    run.cases(cases(run), check, weight=0.6)


@rule("select.ties")
def test_ties(run: Runner) -> None:
    """Compare with the specified selection on scores that tie."""
    draws = (_few_levels, _zeros, _zeros_or_missing)

    def check(trial: Trial) -> None:
        for draw in draws:
            _check(trial, draw)

    run.cases(cases(run), check)


@rule("select.forced")
def test_forced(run: Runner) -> None:
    """Give forced blocks the worst scores, and the others small or huge ones.

    Half of the cases have no budget to spare.
    """
    draws = (_random, _huge)

    def check(trial: Trial) -> None:
        _check(trial, draws[trial.case.choice % 2], at_forced=-torch.inf)

    run.cases(cases(run, spare_budget=False), check, weight=0.5)
    run.cases(cases(run), check, weight=0.3)


@rule("select.format")
def test_format(run: Runner) -> None:
    """Look at short sequences, whose rows see fewer blocks than the budget: some, or most of 96."""

    def check(trial: Trial) -> None:
        topk = trial.case.topk + trial.case.choice % 2 * RELEASED_BUDGET
        _check(trial.on(trial.case.sequences, trial.inputs, topk=topk), _random)

    run.cases(cases(run, max_keys=160), check, weight=0.5)


@rule("select.no-future")
def test_no_future(run: Runner) -> None:
    """Give blocks behind the query's own the best scores."""
    run.cases(cases(run), lambda trial: _check(trial, _random, at_future=1e30), weight=0.5)


@rule("select.budget-covers-all")
def test_budget_covers_all(run: Runner) -> None:
    """Raise the budget to all blocks and beyond."""

    def check(trial: Trial) -> None:
        blocks = -(-trial.inputs.max_seqlen_k // trial.case.block_size)
        topk = trial.case.topk + blocks + trial.case.choice % 3
        wide = trial.on(trial.case.sequences, trial.inputs, topk=topk)
        _check(wide, _random)

    run.cases(cases(run), check, corners=many_blocks(run), weight=0.5)


@rule("select.forced-not-read")
def test_forced_not_read(run: Runner) -> None:
    """Put NaN and infinities at forced and future blocks."""
    poisons = (torch.nan, torch.inf, -torch.inf)

    def check(trial: Trial) -> None:
        poison = poisons[trial.case.choice % 3]
        _check(trial, _random, at_forced=poison, at_future=poison)

    run.cases(cases(run), check, weight=0.7)


@rule("select.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Overwrite the scores of all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2, competing=True),
        lambda trial: check_alone(trial, FUNCTION, ("block_scores",), (torch.nan, 1e30)),
        weight=0.5,
    )


def _check(
    trial: Trial, draw: Draw, at_forced: float | None = None, at_future: float = -torch.inf
) -> None:
    """Judge the selection by drawn scores, overwritten at forced and at future blocks."""
    rows: list[Tensor] = []
    for span in trial.oracle.spans:
        visible = visible_blocks(span, trial.case.config)
        scores = draw((trial.case.kv_heads, *visible.shape), trial.generator)
        if at_forced is not None:
            scores = scores.where(competing_blocks(span, trial.case.config), at_forced)
        rows.append(scores.where(visible, at_future))
    packed = pack_rows(rows, trial.oracle, fill=at_future)
    trial.check(FUNCTION, trial.arguments(FUNCTION, block_scores=packed))
