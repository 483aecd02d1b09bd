"""Stage 5: softmax attention over the tokens of the selected blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.checks import check_same_bits
from infllmv2_conformance.judges import judge_output
from infllmv2_conformance.masks import doubles, unread_tokens
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.selections import pack_selected, random_selection
from infllmv2_conformance.strategies import cases, many_blocks
from infllmv2_conformance.trial import Trial

FUNCTION = "attend"


@rule("attend.values")
def test_values(run: Runner) -> None:
    """Compare the output with the oracle, on selections of stage 4 and on random ones."""
    run.cases(cases(run), lambda trial: _check(trial, lse=False), weight=2)


@rule("attend.lse")
def test_lse(run: Runner) -> None:
    """Compare the LSE, which is far more exact than the output."""
    run.cases(cases(run), _check)


@rule("attend.every-token")
def test_every_token(run: Runner) -> None:
    """Give each token a channel of its own to show up in: none may be lost or counted twice."""
    run.cases(cases(run, regimes=("indexed",), min_keys=1), lambda t: _check(t, lse=False))


@rule("attend.causal")
def test_causal(run: Runner) -> None:
    """Make the keys and values from some token on outrageous: earlier rows must not notice."""

    def check(trial: Trial) -> None:
        k, v = trial.inputs.k.clone(), trial.inputs.v.clone()
        given = _arguments(trial)
        early: list[Tensor] = []
        for span in trial.oracle.spans:
            row = trial.case.choice % (span.num_queries + 1)
            start = span.num_keys - span.num_queries + row
            k[span.keys][start:], v[span.keys][start:] = 3e4, 3e4
            early.append(torch.arange(span.num_queries) < row)
        pieces = trial.run(FUNCTION, given | {"k": k, "v": v})
        for span, piece, rows in zip(trial.oracle.spans, pieces, early, strict=True):
            selected = given["selected"][:, span.queries].cpu()
            judge_output(piece[0], piece[1], selected, span, trial.oracle, trial.note, rows)

    run.cases(cases(run, min_keys=1), check)


@rule("attend.partial-block")
def test_partial_block(run: Runner) -> None:
    """End the sequence inside a block that is selected."""

    def check(trial: Trial) -> None:
        _check(trial, selected=[random_selection(trial, s) for s in trial.oracle.spans])

    run.cases(cases(run, min_keys=1, max_keys=150, regimes=("normal", "indexed")), check)


@rule("attend.few-blocks")
def test_few_blocks(run: Runner) -> None:
    """Select few blocks, not always the query's own, and for some rows none."""

    def check(trial: Trial) -> None:
        rows = [random_selection(trial, s, keep_own=False) for s in trial.oracle.spans]
        for row in rows:
            row[:, :: 3 + trial.case.choice % 3] = -1
        _check(trial, selected=rows)

    run.cases(cases(run, min_keys=1), check)


@rule("attend.unselected-no-effect")
def test_unselected_no_effect(run: Runner) -> None:
    """Make blocks that nobody selects outrageous, but finite."""
    run.cases(cases(run, min_keys=1), lambda trial: _check_unselected(trial, 3e4), weight=0.7)


@rule("attend.unselected-not-read")
def test_unselected_not_read(run: Runner) -> None:
    """Put NaN into blocks that nobody selects, both in keys and in values."""
    run.cases(cases(run, min_keys=1), lambda trial: _check_unselected(trial, torch.nan), weight=0.7)


@rule("attend.group-mapping")
def test_group_mapping(run: Runner) -> None:
    """Give every key/value head values of its own magnitude, and a selection of its own."""

    def check(trial: Trial) -> None:
        heads = torch.arange(trial.case.kv_heads, device=trial.device)[:, None]
        v = (trial.inputs.v.abs() + 1) * (1.0 * 4**heads).to(trial.inputs.v.dtype)
        selected = [random_selection(trial, s) for s in trial.oracle.spans]
        given = _arguments(trial, selected)
        given["v"] = v
        trial.check(FUNCTION, given, against=trial.changed(v=v))

    run.cases(cases(run, min_keys=1, regimes=("normal", "integers")), check, weight=0.7)


@rule("attend.value-scale")
def test_value_scale(run: Runner) -> None:
    """Double v, which is exact in binary arithmetic: the output doubles, the LSE stays."""

    def check(trial: Trial) -> None:
        given = _arguments(trial)
        once = trial.run(FUNCTION, given)
        twice = trial.run(FUNCTION, given | {"v": given["v"] * 2})
        for span, (out, lse), (out2, lse2) in zip(trial.oracle.spans, once, twice, strict=True):
            assert out is not None
            assert out2 is not None
            what = "doubling v did not double the output"
            check_same_bits(what, out2, out * 2, span, "out", doubles(out.cpu()))
            if lse is not None and lse2 is not None:
                check_same_bits("doubling v changed the LSE", lse2, lse, span, "lse")

    if not run.candidate.capabilities.deterministic:
        run.unclaimed("deterministic")
    run.cases(cases(run, regimes=("normal", "peaked", "correlated")), check, weight=0.7)


@rule("attend.equals-dense")
def test_equals_dense(run: Runner) -> None:
    """Select every visible block and compare with dense causal attention."""

    def check(trial: Trial) -> None:
        given = _arguments(trial, [trial.oracle.everything(s) for s in trial.oracle.spans])
        trial.check(FUNCTION, given)

    run.cases(cases(run), check, corners=many_blocks(run), weight=0.7)


@rule("attend.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Put NaN into all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2),
        lambda trial: check_alone(trial, FUNCTION, ("q", "k", "v")),
        weight=0.7,
    )


def _arguments(trial: Trial, selected: list[Tensor] | None = None) -> dict[str, Any]:
    """Return the arguments with the given selection, or one of stage 4 or a random one."""
    if selected is None and trial.case.choice % 2:
        selected = [random_selection(trial, s) for s in trial.oracle.spans]
    if selected is None:
        selected = list(trial.oracle.selected)
    return trial.arguments(FUNCTION, selected=pack_selected(selected, trial.oracle))


def _check(trial: Trial, lse: bool = True, selected: list[Tensor] | None = None) -> None:
    given = _arguments(trial, selected)
    pieces = trial.run(FUNCTION, given)
    if not lse:
        pieces = [(out, None) for out, _ in pieces]
    trial.judge(FUNCTION, pieces, given)


def _check_unselected(trial: Trial, poison: float) -> None:
    """Ban some blocks from all selections and overwrite their tokens with `poison`."""
    k, v = trial.inputs.k.clone(), trial.inputs.v.clone()
    rows: list[Tensor] = []
    for span in trial.oracle.spans:
        blocks = -(-span.num_keys // trial.case.block_size)
        banned = torch.rand(blocks, generator=trial.generator) < 0.4
        selected = random_selection(trial, span, keep_own=False, banned=banned)
        tokens = unread_tokens(selected, span, trial.case.block_size)
        k[span.keys][tokens] = poison
        v[span.keys][tokens] = poison
        rows.append(selected)
    given = _arguments(trial, rows)
    trial.check(FUNCTION, given | {"k": k, "v": v})
