"""Stage 5, backwards: gradients of q, k and v; the selection is a constant."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.checks import check_same_bits, check_values
from infllmv2_conformance.gradients import Gradients, differentiate, expected_gradients
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.selections import pack_selected, random_selection
from infllmv2_conformance.strategies import cases
from infllmv2_conformance.trial import Trial

SMALL = 130


@rule("attend.gradients")
def test_gradients(run: Runner) -> None:
    """Compare dq, dk and dv with the oracle's for a random gradient of the output."""

    def check(trial: Trial) -> None:
        _check(trial, [random_selection(trial, s) for s in trial.oracle.spans])

    regimes = ("normal", "peaked", "integers", "indexed", "correlated")
    run.cases(cases(run, max_keys=SMALL, min_keys=1, regimes=regimes), check)


@rule("attend.gradient-unselected")
def test_gradient_unselected(run: Runner) -> None:
    """Ban some blocks: their keys and values must get exactly 0."""

    def check(trial: Trial) -> None:
        rows: list[Tensor] = []
        banned: list[Tensor] = []
        for span in trial.oracle.spans:
            blocks = -(-span.num_keys // trial.case.block_size)
            ban = torch.rand(blocks, generator=trial.generator) < 0.5
            rows.append(random_selection(trial, span, keep_own=False, banned=ban))
            banned.append(ban.repeat_interleave(trial.case.block_size)[: span.num_keys])
        _, dk, dv = _differentiate(trial, pack_selected(rows, trial.oracle))
        for span, tokens in zip(trial.oracle.spans, banned, strict=True):
            for name, gradient in (("k", dk), ("v", dv)):
                actual = gradient[span.keys]
                zero = torch.zeros(actual.shape, dtype=torch.float64)
                what = f"an unselected token has a gradient of {name}"
                mask = tokens[:, None, None]
                check_values(what, actual, Bounded(zero, zero), span, name, trial.note, mask)

    run.cases(cases(run, max_keys=SMALL, min_keys=1, regimes=("normal",)), check, weight=0.5)


@rule("attend.gradient-empty-rows")
def test_gradient_empty_rows(run: Runner) -> None:
    """Let some rows select nothing: they add nothing, and no NaN appears."""

    def check(trial: Trial) -> None:
        rows = [random_selection(trial, s, keep_own=False) for s in trial.oracle.spans]
        for row in rows:
            row[:, :: 2 + trial.case.choice % 2] = -1
        _check(trial, rows)

    run.cases(cases(run, max_keys=SMALL, min_keys=1, regimes=("normal",)), check, weight=0.5)


@rule("attend.gradient-repeatable")
def test_gradient_repeatable(run: Runner) -> None:
    """Send the same gradient back twice and compare the bits."""

    def check(trial: Trial) -> None:
        rows = [random_selection(trial, s) for s in trial.oracle.spans]
        selected = pack_selected(rows, trial.oracle)
        first, again = (_differentiate(trial, selected) for _ in range(2))
        for span in trial.oracle.spans:
            cuts = (span.queries, span.keys, span.keys)
            for name, one, two, cut in zip("qkv", first, again, cuts, strict=True):
                what = f"the same call gave other bits in the gradient of {name}"
                check_same_bits(what, two[cut], one[cut], span, name)

    run.cases(cases(run, max_keys=SMALL, min_keys=1, regimes=("normal",)), check, weight=0.3)


def _check(trial: Trial, rows: list[Tensor]) -> None:
    selected = pack_selected(rows, trial.oracle)
    actual = _differentiate(trial, selected)
    for span, row in zip(trial.oracle.spans, rows, strict=True):
        expected = expected_gradients(trial, span, row)
        cuts = (span.queries, span.keys, span.keys)
        for name, gradient, bounded, cut in zip("qkv", actual, expected, cuts, strict=True):
            what = f"the gradient of {name} is wrong"
            check_values(what, gradient[cut], bounded, span, name, trial.note)


def _differentiate(trial: Trial, selected: Tensor) -> Gradients:
    given = trial.arguments("attend", selected=selected)
    return differentiate(trial, "attend", given)
