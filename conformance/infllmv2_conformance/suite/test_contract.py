"""What holds for every function, whatever it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_conformance.checks import check_same_bits
from infllmv2_conformance.failure import fail
from infllmv2_conformance.inputs import pick
from infllmv2_conformance.invalid import check_refused, invalid_calls
from infllmv2_conformance.judges import defined
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, corner, shape_classes
from infllmv2_conformance.trial import Trial

KINDS = {
    "compress_keys": ("windows",),
    "score_windows": ("scores",),
    "pool_blocks": ("block_scores",),
    "select_blocks": ("selected",),
    "score_blocks": ("block_scores",),
    "select": ("selected",),
    "attend": ("out", "lse"),
    "attention": ("out", "lse", "selected"),
}
CALM = ("normal", "correlated")


@rule("contract.form")
def test_form(run: Runner) -> None:
    """Look at shapes, dtypes and devices, at the smallest and at ordinary sizes."""

    def check(trial: Trial) -> None:
        trial.run(trial.function, trial.arguments(trial.function))

    claims = run.candidate.capabilities
    shapes = shape_classes(claims, run.profile.shape_classes)
    corners = [
        corner(claims, shape, (1, 1), dtype=dtype)
        for shape in shapes[:2]
        for dtype in claims.dtypes
    ]
    run.cases(cases(run), check, corners=corners, weight=0.3)


@rule("contract.loose-lengths")
def test_loose_lengths(run: Runner) -> None:
    """Give maximal lengths that no sequence has, as a buffer of fixed size does."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        given = trial.arguments(trial.function)
        more = 1 + trial.case.choice % 100
        given |= {n: given[n] + more for n in ("max_seqlen_q", "max_seqlen_k") if n in given}
        trial.check(trial.function, given)

    run.cases(cases(run), check, weight=0.2)


@rule("contract.strided")
def test_strided(run: Runner) -> None:
    """Pass views with other strides: a slice of a fused projection, a transposed layout."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        given = trial.arguments(trial.function)
        for index, name in enumerate(("q", "k", "v", "k_c1", "scores", "block_scores")):
            if name not in given:
                continue
            x = given[name]
            if (trial.case.choice + index) % 2:
                view = x.transpose(0, 1).contiguous().transpose(0, 1)
            else:
                view = torch.cat([x, torch.full_like(x, torch.nan)], dim=-1)[..., : x.shape[-1]]
            given[name] = view
        trial.check(trial.function, given)

    run.cases(cases(run, regimes=CALM), check, weight=0.3)


@rule("contract.empty")
def test_empty(run: Runner) -> None:
    """Pass batches of no sequences, and of sequences without queries or without keys."""
    claims = run.candidate.capabilities
    shapes = shape_classes(claims, run.profile.shape_classes)
    batches = [(), ((0, 0),), ((0, 5),), ((0, 0), (3, 70), (0, 0)), ((2, 2), (0, 40), (1, 1))]
    if not claims.packed:
        batches = [b for b in batches if len(b) == 1]
    if not claims.history:
        batches = [tuple((t and s, t and s) for t, s in b) for b in batches]
    corners = [corner(claims, shape, *batch) for shape in shapes[:1] for batch in batches]

    def check(trial: Trial) -> None:
        full = [s for s in trial.oracle.spans if s.num_queries]
        inputs = pick(trial.inputs, [(s.queries, s.keys) for s in full])
        rest = trial.on([(s.num_queries, s.num_keys) for s in full], inputs)
        if not full or rest.is_sound():
            trial.check(trial.function)
        trial.sound, trial.unsound = rest.sound, rest.unsound

    run.cases(cases(run, max_keys=1), check, corners=corners, weight=0.1)


@rule("contract.repeatable")
def test_repeatable(run: Runner) -> None:
    """Call three times and compare the bits."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        given = trial.arguments(trial.function)
        first = trial.run(trial.function, given)
        for _ in range(2):
            again = trial.run(trial.function, given)
            _same(trial, "the same call gave other bits", again, first)

    run.cases(cases(run, regimes=CALM), check, weight=0.3)


@rule("contract.fresh-data")
def test_fresh_data(run: Runner) -> None:
    """Overwrite the tensors in place and call again: the result must follow the data."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        given = trial.arguments(trial.function)
        given = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        trial.split(trial.function, trial.candidate.call_on(trial.function, **given))
        other = trial.redrawn()
        fresh = other.arguments(trial.function)
        for name, x in fresh.items():
            if isinstance(x, Tensor):
                given[name].copy_(x)
        result = trial.candidate.call_on(trial.function, **given)
        other.judge(trial.function, other.split(trial.function, result), fresh)

    run.cases(cases(run, regimes=CALM), check, weight=0.3)


@rule("contract.batch-invariant")
def test_batch_invariant(run: Runner) -> None:
    """Compute every sequence alone and compare the bits with those of the batch."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        together = trial.run(trial.function, trial.arguments(trial.function))
        for span, piece in zip(trial.oracle.spans, together, strict=True):
            inputs = pick(trial.inputs, [(span.queries, span.keys)])
            alone = trial.on([(span.num_queries, span.num_keys)], inputs)
            pieces = alone.run(trial.function, alone.arguments(trial.function))
            what = "a row's bits depend on its batch"
            _same(alone, what, [piece], pieces)

    run.cases(cases(run, min_sequences=2, regimes=CALM), check, weight=0.3)


@rule("contract.bad-input")
def test_bad_input(run: Runner) -> None:
    """Break one argument at a time; the error must be a ValueError or TypeError that names it."""

    def check(trial: Trial) -> None:
        given = trial.arguments(trial.function)
        for wrong in invalid_calls(trial.function, given, trial.capabilities):
            error = trial.candidate.error_of(trial.function, **(given | wrong.changes))
            check_refused(wrong, error)

    claims = run.candidate.capabilities
    shape = shape_classes(claims, run.profile.shape_classes)[0]
    lengths = (24, 40) if claims.history else (40, 40)
    batch = (lengths, (9, 9)) if claims.packed else (lengths,)
    first = corner(claims, shape, *batch, kv_heads=2)
    run.cases(cases(run, min_keys=2, max_keys=60), check, corners=[first], weight=0.1)


def _same(
    trial: Trial,
    what: str,
    actual: list[tuple[Tensor | None, ...]],
    expected: list[tuple[Tensor | None, ...]],
) -> None:
    """Compare the bits of everything that the contract defines."""
    trial.judge(trial.function, actual, trial.arguments(trial.function))
    for span, ours, theirs in zip(trial.oracle.spans, actual, expected, strict=True):
        for kind, a, b in zip(KINDS[trial.function], ours, theirs, strict=False):
            if a is None or b is None:
                continue
            if kind == "selected":
                if not torch.equal(a, b):
                    fail(f"{what}: the selection", where={"sequence": span.sequence})
            else:
                mask = defined(trial.function, span, trial.case.config)
                check_same_bits(what, a, b, span, kind, mask)
