"""Stage 1: windows are means of complete spans of keys."""

from __future__ import annotations

import torch

from infllmv2_conformance.cases import Case
from infllmv2_conformance.checks import check_same_bits
from infllmv2_conformance.inputs import pick
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, corner, shape_classes
from infllmv2_conformance.trial import Trial


@rule("compress.values")
def test_values(run: Runner) -> None:
    """Compare every window with the float64 mean."""
    run.cases(cases(run), _check)


@rule("compress.complete-windows")
def test_complete_windows(run: Runner) -> None:
    """Visit every length around the first windows, all in one batch where that is claimed."""
    claims = run.candidate.capabilities
    corners: list[Case] = []
    for shape in shape_classes(claims, run.profile.shape_classes):
        size, s = shape["kernel_size"], shape["kernel_stride"]
        lengths = [0, 1, size - 1, size, size + s - 1, size + s, 3 * s + size]
        lengths = [n for n in lengths if n > 0 or claims.empty_sequences]
        rows = tuple((min(n, 1) if claims.history else n, n) for n in lengths)
        batches = [rows] if claims.packed else [(row,) for row in rows]
        corners += [corner(claims, shape, *batch) for batch in batches]
    run.cases(cases(run, max_keys=150), _check, corners=corners, weight=0.3)


@rule("compress.prefix-stable")
def test_prefix_stable(run: Runner) -> None:
    """Compress a prefix and the whole: the windows of the prefix must be the same."""

    def check(trial: Trial) -> None:
        pieces = _check(trial)
        num_queries, num_keys = trial.case.sequences[0]
        shorter = trial.case.choice % (num_keys + 1)
        rows = slice(0, min(shorter, num_queries)), slice(0, shorter)
        prefix = trial.on([(rows[0].stop, shorter)], pick(trial.inputs, [rows]))
        parts = prefix.check("compress_keys")
        if trial.capabilities.deterministic:
            before, after = parts[0][0], pieces[0][0]
            assert before is not None
            assert after is not None
            what = "a window changed when keys were appended"
            check_same_bits(what, after[: len(before)], before, trial.oracle.spans[0], "windows")

    run.cases(cases(run, min_sequences=1, max_sequences=1), check, weight=0.5)


@rule("compress.tail-not-read")
def test_tail_not_read(run: Runner) -> None:
    """Put NaN behind the last complete window of every sequence."""

    def check(trial: Trial) -> None:
        k = trial.inputs.k.clone()
        for span, (windows, _) in zip(trial.oracle.spans, trial.oracle.windows, strict=True):
            count = len(windows[0])
            used = (count - 1) * trial.case.kernel_stride + trial.case.kernel_size if count else 0
            k[span.keys][used:] = torch.nan
        given = trial.arguments("compress_keys", k=k)
        trial.check("compress_keys", given)

    run.cases(cases(run), check, weight=0.5)


@rule("compress.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Put NaN into all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2),
        lambda trial: check_alone(trial, "compress_keys", ("k",)),
        weight=0.5,
    )


def _check(trial: Trial) -> list[tuple[torch.Tensor | None, ...]]:
    return trial.check("compress_keys")
