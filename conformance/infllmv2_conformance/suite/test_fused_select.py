"""Stages 2 to 4 fused: scores of blocks, and selections, straight from q and the windows."""

from __future__ import annotations

import torch

from infllmv2_conformance.cases import WITHOUT_OVERFLOW
from infllmv2_conformance.checks import check_certificate, check_form
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases
from infllmv2_conformance.trial import Trial

RELEASED_BUDGET = 96


@rule("score_blocks.values")
def test_score_blocks(run: Runner) -> None:
    """Compare the scores of the blocks that compete; those of forced blocks are free."""
    run.cases(cases(run, competing=True), lambda trial: trial.check("score_blocks"))


@rule("score_blocks.packed-alone")
def test_score_blocks_packed_alone(run: Runner) -> None:
    """Overwrite all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2, competing=True, regimes=WITHOUT_OVERFLOW),
        lambda trial: check_alone(trial, "score_blocks", ("q", "k_c1", "k_c2")),
        weight=0.5,
    )


@rule("fused_select.certificate")
def test_certificate(run: Runner) -> None:
    """Ask of every block passed over whether the bounds allow it."""
    run.cases(cases(run, competing=True), lambda trial: trial.check("select"), weight=1.5)
    run.cases(cases(run), lambda trial: trial.check("select"), weight=0.5)


@rule("fused_select.ties")
def test_ties(run: Runner) -> None:
    """Make every window score exactly the same, whatever the order of summation.

    All windows of K_C1 are equal. One head of each group scores them; K_C2 gives the others a
    normaliser so large that their share is 0 in any arithmetic. With the exact normaliser that
    cannot be arranged, but a sum of one or two equal numbers is exact.
    """

    def check(trial: Trial) -> None:
        q = torch.zeros_like(trial.inputs.q)
        q.unflatten(1, (trial.case.kv_heads, -1))[:, :, 1:, 1] = 64
        k_c1, k_c2 = (torch.zeros_like(trial.oracle.packed_windows(i)[0]) for i in (0, 1))
        k_c1[..., 0], k_c2[..., 1] = 1, 64
        oracle = trial.changed(q=q).with_windows(k_c1, k_c2)
        pieces = trial.run("select", trial.arguments("select", q=q, k_c1=k_c1, k_c2=k_c2))
        for span, (selected,) in zip(oracle.spans, pieces, strict=True):
            assert selected is not None
            check_form(selected, span, oracle.config)
            scores = oracle.block_scores[span.sequence]
            check_certificate(selected, scores, span, oracle.config, ties=True)

    modes = run.candidate.capabilities.lse_modes
    drawn = cases(run, min_keys=1, lse=modes, competing=True)
    exact_sums = drawn.filter(lambda case: case.lse == "approximate" or case.group <= 2)
    groups = run.candidate.capabilities.group_sizes or (1,)
    if "approximate" not in modes and min(groups) > 2:
        run.unclaimed("lse_modes 'approximate', or group_sizes up to 2")
    run.cases(exact_sums, check)


@rule("fused_select.format")
def test_format(run: Runner) -> None:
    """Look at short sequences, with tight budgets and with one as large as the released one."""

    def check(trial: Trial) -> None:
        topk = trial.case.topk + trial.case.choice % 2 * RELEASED_BUDGET
        trial.on(trial.case.sequences, trial.inputs, topk=topk).check("select")

    run.cases(cases(run, max_keys=160, spare_budget=False), check, weight=0.5)


@rule("fused_select.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Overwrite all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2, competing=True, regimes=WITHOUT_OVERFLOW),
        lambda trial: check_alone(trial, "select", ("q", "k_c1", "k_c2")),
        weight=0.5,
    )
