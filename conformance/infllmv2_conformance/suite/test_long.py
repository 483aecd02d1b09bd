"""Long contexts: calls at full length, of which sampled rows are judged in float64.

`infllmv2 check IMPL --long 131072` runs these rules, and nothing else does: they take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infllmv2_conformance.cases import Case
from infllmv2_conformance.long.cases import Means, Plan
from infllmv2_conformance.long.decoding import QUERIES, check_decode, with_steps
from infllmv2_conformance.long.gradients import check_gradients
from infllmv2_conformance.long.trials import check_rows
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.trial import Trial

Choose = Callable[[Plan], Sequence[Case]]


@rule("long.compress")
def test_compress(run: Runner) -> None:
    """Compress keys whose channels have a mean, so that a running sum would grow."""
    _run(
        run,
        "compress_keys",
        lambda plan: [
            plan.released(rows=1, regime="correlated"),
            plan.fine(rows=1, regime="correlated"),
        ],
    )


@rule("long.score")
def test_score(run: Runner) -> None:
    """Score windows for the last queries, with both normalisers if both are claimed."""
    _run(
        run,
        "score_windows",
        lambda plan: [
            plan.released("windows", regime="needles"),
            plan.fine("windows", regime="correlated"),
        ],
    )


@rule("long.pool")
def test_pool(run: Runner) -> None:
    """Pool random scores, invisible ones among them."""
    _run(run, "pool_blocks", lambda plan: [plan.released("windows"), plan.fine("windows")])


@rule("long.block-scores")
def test_block_scores(run: Runner) -> None:
    """Score blocks for the last queries."""
    _run(
        run,
        "score_blocks",
        lambda plan: [
            plan.released("blocks", regime="needles"),
            plan.fine("blocks", regime="correlated"),
        ],
    )


@rule("long.select")
def test_select(run: Runner) -> None:
    """Select by random scores of all blocks."""
    _run(run, "select_blocks", lambda plan: [plan.released("blocks"), plan.fine("blocks")])


@rule("long.fused-select")
def test_fused_select(run: Runner) -> None:
    """Ask for needles, then among many blocks, then with many queries."""
    _run(run, "select", _whole)


@rule("long.attend")
def test_attend(run: Runner) -> None:
    """Attend blocks that are spread over the whole context."""
    _run(run, "attend", lambda plan: [plan.released(), plan.wide(regime="correlated")])


@rule("long.gradients")
def test_gradients(run: Runner) -> None:
    """Send gradients back from a few rows, through blocks spread over the whole context."""
    plan = _plan(run)
    run.each([plan.released(rows=32), plan.wide(regime="correlated")], check_gradients)


@rule("long.attention")
def test_attention(run: Runner) -> None:
    """Run the whole forward, sparse and, one key below dense_len, dense."""
    _run(run, "attention", lambda plan: [*_whole(plan), plan.dense(regime="correlated")])


@rule("long.decode")
def test_decode(run: Runner) -> None:
    """Fill a cache in pieces and decode its last tokens."""
    plan = _plan(run)
    drawn = [
        plan.released(rows=QUERIES, regime="needles"),
        plan.fine(rows=QUERIES, regime="correlated"),
    ]
    run.each([with_steps(case) for case in drawn], check_decode)


def _whole(plan: Plan) -> list[Case]:
    return [
        plan.released(regime="needles"),
        plan.fine(regime="correlated"),
        plan.wide(regime="normal"),
    ]


def _run(run: Runner, function: str, choose: Choose) -> None:
    def check(trial: Trial) -> None:
        check_rows(trial, function)

    run.each(choose(_plan(run)), check)


def _plan(run: Runner) -> Plan:
    """Return what makes the cases; a case that is repeated says itself how long it is."""
    length = run.length or max(keys for _, keys in (run.only or Case(())).sequences)
    return Plan(run.candidate.capabilities, Means.of(run.device), length)
