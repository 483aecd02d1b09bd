"""Stage 6: the whole forward. Values follow the implementation's own, certified, selection."""

from __future__ import annotations

import torch

from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.cases import WITHOUT_OVERFLOW, Case
from infllmv2_conformance.checks import check_certificate, check_form, check_values
from infllmv2_conformance.failure import fail
from infllmv2_conformance.gradients import differentiate, expected_gradients
from infllmv2_conformance.inputs import pick
from infllmv2_conformance.judges import judge_output
from infllmv2_conformance.masks import unread_tokens
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, many_blocks
from infllmv2_conformance.trial import Trial

FUNCTION = "attention"


@rule("attention.values")
def test_values(run: Runner) -> None:
    """Compare output and LSE with the oracle's for the selection that was returned."""

    def check(trial: Trial) -> None:
        given = trial.arguments(FUNCTION)
        pieces = trial.run(FUNCTION, given)
        if not trial.capabilities.returns_selection:
            trial.judge(FUNCTION, pieces, given)
            return
        for span, (out, lse, selected) in zip(trial.oracle.spans, pieces, strict=True):
            assert selected is not None
            check_form(selected, span, trial.case.config)
            judge_output(out, lse, selected.cpu(), span, trial.oracle, trial.note)

    run.cases(cases(run), check, weight=1.5)


@rule("attention.selection")
def test_selection(run: Runner) -> None:
    """Ask of every block passed over whether the bounds allow it, compression included."""

    def check(trial: Trial) -> None:
        pieces = trial.run(FUNCTION, trial.arguments(FUNCTION))
        for span, (_, _, selected) in zip(trial.oracle.spans, pieces, strict=True):
            assert selected is not None
            check_form(selected, span, trial.case.config)
            scores = trial.oracle.end_to_end_block_scores[span.sequence]
            trial.note(check_certificate(selected, scores, span, trial.case.config))

    run.cases(cases(run, competing=True), check, weight=1.5)


@rule("attention.chunks")
def test_chunks(run: Runner) -> None:
    """Send a sequence in chunks, each with its history; judge each as rows of one prefill."""

    def check(trial: Trial) -> None:
        (num_queries, num_keys), start = trial.case.sequences[0], 0
        generator = trial.generator
        while start < num_queries:
            length = int(torch.randint(1, max(num_queries - start, 1) + 1, (), generator=generator))
            if trial.case.choice % 4 == 0:
                length = min(length, 3)
            past = num_keys - num_queries
            end = past + start + length
            rows = slice(start, start + length), slice(0, end)
            chunk = trial.on([(length, end)], pick(trial.inputs, [rows]))
            chunk.check(FUNCTION)
            start += length

    sequences = cases(run, max_sequences=1, max_keys=200, competing=True)
    run.cases(sequences, check, weight=0.7)


@rule("attention.append")
def test_append(run: Runner) -> None:
    """Make everything from some token on outrageous: the rows before are judged as before."""

    def check(trial: Trial) -> None:
        (num_queries, num_keys) = trial.case.sequences[0]
        row = trial.case.choice % (num_queries + 1)
        start = num_keys - num_queries + row
        later = {n: getattr(trial.inputs, n).clone() for n in ("k", "v")}
        later["k"][start:], later["v"][start:] = 3e4, 3e4
        pieces = trial.run(FUNCTION, trial.arguments(FUNCTION) | later)
        cut = trial.on([(row, start)], pick(trial.inputs, [(slice(0, row), slice(0, start))]))
        early = [
            tuple(
                None if x is None else x[:row] if i < 2 else x[:, :row] for i, x in enumerate(piece)
            )
            for piece in pieces
        ]
        cut.judge(FUNCTION, early, cut.arguments(FUNCTION))

    one = cases(run, min_sequences=1, max_sequences=1, min_keys=1, regimes=WITHOUT_OVERFLOW)
    run.cases(one, check, weight=0.7)


@rule("attention.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Overwrite all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2),
        lambda trial: check_alone(trial, FUNCTION, ("q", "k", "v")),
        weight=0.7,
    )


@rule("attention.permutation")
def test_permutation(run: Runner) -> None:
    """Pack the sequences in reverse and judge each against its own oracle."""

    def check(trial: Trial) -> None:
        order = list(reversed(trial.oracle.spans))
        inputs = pick(trial.inputs, [(s.queries, s.keys) for s in order])
        sequences = [(s.num_queries, s.num_keys) for s in order]
        trial.on(sequences, inputs).check(FUNCTION)

    run.cases(cases(run, min_sequences=2), check, weight=0.5)


@rule("attention.kv-heads")
def test_kv_heads(run: Runner) -> None:
    """Keep one key/value head with its query heads, as tensor parallelism does."""

    def check(trial: Trial) -> None:
        head = trial.case.choice % trial.case.kv_heads
        rows = [(s.queries, s.keys) for s in trial.oracle.spans]
        inputs = pick(trial.inputs, rows, slice(head, head + 1))
        trial.on(trial.case.sequences, inputs, kv_heads=1).check(FUNCTION)

    run.cases(cases(run), check, weight=0.5)


@rule("attention.switch")
def test_switch(run: Runner) -> None:
    """Put dense_len at, just below and just above the lengths of the batch, and at -1."""
    run.cases(cases(run, dense=True, competing=True), _check)
    run.cases(cases(run, dense=True, min_keys=1), _check, weight=0.5)


@rule("attention.unselected-not-read")
def test_unselected_not_read(run: Runner) -> None:
    """Ask for the selection, put NaN into the values that nobody selected, and ask again."""

    def check(trial: Trial) -> None:
        given = trial.arguments(FUNCTION)
        before = trial.run(FUNCTION, given)
        changed = {n: given[n].clone() for n in ("k", "v")}
        for span, (_, _, selected) in zip(trial.oracle.spans, before, strict=True):
            assert selected is not None
            if trial.case.config.is_sparse(span.num_keys):
                check_form(selected, span, trial.case.config)
                tokens = unread_tokens(selected.cpu(), span, trial.case.block_size)
                changed["v"][span.keys][tokens] = torch.nan
                if trial.case.use_nope:  # then keys do not select
                    changed["k"][span.keys][tokens] = torch.nan
        after = trial.run(FUNCTION, given | changed)
        for span, old, (out, lse, selected) in zip(trial.oracle.spans, before, after, strict=True):
            assert selected is not None
            assert old[2] is not None
            if not trial.case.config.is_sparse(span.num_keys):
                selected = trial.oracle.everything(span)
            elif not torch.equal(selected, old[2]):
                fail("the selection depends on values", where={"sequence": span.sequence})
            judge_output(out, lse, selected.cpu(), span, trial.oracle, trial.note)

    run.cases(cases(run, competing=True, dense=True, use_nope=True), check, weight=0.5)


@rule("attention.equals-dense")
def test_equals_dense(run: Runner) -> None:
    """Raise the budget to all blocks: sparse and dense mode must both be dense attention."""

    def check(trial: Trial) -> None:
        blocks = -(-trial.inputs.max_seqlen_k // trial.case.block_size)
        for dense_len in (-1, trial.inputs.max_seqlen_k + 1):
            wide: Case = trial.case.with_(topk=trial.case.topk + blocks, dense_len=dense_len)
            mode = trial.on(wide.sequences, trial.inputs, topk=wide.topk, dense_len=dense_len)
            pieces = mode.run(FUNCTION, mode.arguments(FUNCTION))
            for span, (out, lse, _) in zip(mode.oracle.spans, pieces, strict=True):
                if span.num_queries == 0 or out is None:
                    continue
                expected = mode.oracle.attend(span, mode.oracle.everything(span))
                what = "sparse attention with every block is not dense attention"
                check_values(what, out, expected[0], span, "out", trial.note)
                if lse is not None:
                    check_values(what, lse, expected[1], span, "lse", trial.note)

    run.cases(cases(run), check, corners=many_blocks(run), weight=0.5)


@rule("attention.selection-inputs")
def test_selection_inputs(run: Runner) -> None:
    """Draw selection_q and selection_k apart from q and k."""

    def check(trial: Trial) -> None:
        if trial.case.use_nope:
            trial.check(FUNCTION)

    run.cases(cases(run, use_nope=True, competing=True), check)


@rule("attention.gradients")
def test_gradients(run: Runner) -> None:
    """Compare gradients with those of attend for the selection that was returned, or for all."""

    def check(trial: Trial) -> None:
        given = trial.arguments(FUNCTION)
        pieces = trial.run(FUNCTION, given)
        actual = differentiate(trial, FUNCTION, given)
        for span, (_, _, selected) in zip(trial.oracle.spans, pieces, strict=True):
            assert selected is not None
            if not trial.case.config.is_sparse(span.num_keys):
                selected = trial.oracle.everything(span)
            expected: tuple[Bounded, ...] = expected_gradients(trial, span, selected.cpu())
            cuts = (span.queries, span.keys, span.keys)
            for name, gradient, bounded, cut in zip("qkv", actual, expected, cuts, strict=True):
                what = f"the gradient of {name} is wrong"
                check_values(what, gradient[cut], bounded, span, name, trial.note)

    claims = run.candidate.capabilities
    if not (claims.returns_selection and claims.deterministic):
        run.unclaimed("returns_selection and deterministic")
    run.cases(
        cases(run, max_keys=130, min_keys=1, dense=True, regimes=("normal",), use_nope=True),
        check,
        weight=0.7,
    )


def _check(trial: Trial) -> None:
    trial.check(FUNCTION)
