"""Stage 2: windows are scored per head, normalised, and summed over the group."""

from __future__ import annotations

import torch

from infllmv2_conformance.cases import WITHOUT_OVERFLOW, Case
from infllmv2_conformance.neighbours import check_alone
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases, corner, shape_classes
from infllmv2_conformance.trial import Trial

FUNCTION = "score_windows"
MODERATE = ("normal", "peaked", "integers", "needles", "correlated", "tiny")


@rule("score.values-exact")
def test_values_exact(run: Runner) -> None:
    """Compare with the oracle, normalised over K_C1."""
    if "exact" in run.candidate.capabilities.lse_modes:
        run.cases(cases(run, lse=("exact",), regimes=WITHOUT_OVERFLOW), _check)
    else:
        run.unclaimed("lse_modes 'exact'")


@rule("score.values-approximate")
def test_values_approximate(run: Runner) -> None:
    """Compare with the oracle, normalised over K_C2."""
    if "approximate" in run.candidate.capabilities.lse_modes:
        run.cases(cases(run, lse=("approximate",), regimes=WITHOUT_OVERFLOW), _check)
    else:
        run.unclaimed("lse_modes 'approximate'")


@rule("score.visibility")
def test_visibility(run: Runner) -> None:
    """Visit every position at which a window ends, and its neighbours, in one prefill."""
    claims = run.candidate.capabilities
    corners: list[Case] = []
    for shape in shape_classes(claims, run.profile.shape_classes):
        for lse in claims.lse_modes:
            length = min(4 * shape["kernel_size"] + 5 * shape["kernel_stride"], 260)
            fields = {"lse": lse, "regime": "integers", "kv_heads": 1}
            corners.append(corner(claims, shape, (length, length), **fields))
    run.cases(cases(run, regimes=("integers",)), _check, corners=corners, weight=0.3)


@rule("score.invisible-not-read")
def test_invisible_not_read(run: Runner) -> None:
    """Make the last windows outrageous: the rows before them must not notice."""

    def check(trial: Trial) -> None:
        packed = [trial.oracle.packed_windows(0)[0], trial.oracle.packed_windows(1)[0]]
        for which, windows in enumerate(packed):
            start = 0
            for pair in trial.oracle.windows:
                count = len(pair[which][0])
                windows[start + (trial.case.choice % (count + 1)) : start + count] = 64
                start += count
        given = trial.arguments(FUNCTION, k_c1=packed[0], k_c2=packed[1])
        trial.check(FUNCTION, given, against=trial.oracle.with_windows(*packed))

    run.cases(cases(run, min_keys=1, regimes=MODERATE), check, weight=0.5)


@rule("score.normaliser-only")
def test_normaliser_only(run: Runner) -> None:
    """Replace K_C2: with the exact normaliser nothing changes, else only the normaliser."""

    def check(trial: Trial) -> None:
        k_c1, k_c2 = (trial.oracle.packed_windows(which)[0] for which in (0, 1))
        other = k_c2.flip(0).contiguous()
        against = trial.oracle.with_windows(k_c1, other)
        if trial.case.lse == "exact":
            other = torch.full_like(k_c2, torch.nan)
        trial.check(FUNCTION, trial.arguments(FUNCTION, k_c2=other), against=against)

    run.cases(cases(run, min_keys=1, regimes=MODERATE), check, weight=0.5)


@rule("score.group-sum")
def test_group_sum(run: Runner) -> None:
    """Silence all query heads but one: only its own key/value head may score by its keys."""

    def check(trial: Trial) -> None:
        heads = trial.case.query_heads
        head = heads - 1 if trial.case.choice % 3 == 0 else trial.case.choice % heads
        q = torch.zeros_like(trial.inputs.q)
        q[:, head] = trial.inputs.q[:, head]
        trial.check(FUNCTION, trial.arguments(FUNCTION, q=q), against=trial.changed(q=q))

    run.cases(cases(run, min_keys=1, regimes=MODERATE), check, weight=0.5)


@rule("score.shift")
def test_shift(run: Runner) -> None:
    """Shift all keys by one integer vector: all logits of a row move alike, no score does."""

    def check(trial: Trial) -> None:
        shift = torch.arange(trial.case.head_dim, device=trial.device) % 3 * 48
        k = trial.inputs.k + shift.to(trial.inputs.k.dtype)
        shifted = trial.changed(k=k)
        k_c1, _ = shifted.packed_windows(0)
        k_c2, _ = shifted.packed_windows(1)
        given = trial.arguments(FUNCTION, k_c1=k_c1, k_c2=k_c2)
        trial.check(FUNCTION, given, against=shifted)

    run.cases(cases(run, min_keys=1, regimes=("integers",)), check, weight=0.5)


@rule("score.no-normaliser")
def test_no_normaliser(run: Runner) -> None:
    """Look at rows that see windows of K_C1 and none of K_C2."""
    claims = run.candidate.capabilities
    if "approximate" not in claims.lse_modes:
        run.unclaimed("lse_modes 'approximate'")
        return
    corners: list[Case] = []
    for shape in shape_classes(claims, run.profile.shape_classes):
        length = 4 * shape["kernel_size"] + 1
        fields = {"lse": "approximate", "kv_heads": 1}
        corners.append(corner(claims, shape, (length, length), **fields))
    run.cases(cases(run, lse=("approximate",), max_keys=130), _check, corners=corners, weight=0.3)


@rule("score.large-logits")
def test_large_logits(run: Runner) -> None:
    """Feed logits of several hundred: NaN is never right, infinity only where the bound says so."""
    run.cases(cases(run, min_keys=1, regimes=("huge",)), _check)


@rule("score.packed-alone")
def test_packed_alone(run: Runner) -> None:
    """Put NaN into all other sequences of the batch."""
    run.cases(
        cases(run, min_sequences=2),
        lambda trial: check_alone(trial, FUNCTION, ("q", "k_c1", "k_c2")),
        weight=0.5,
    )


def _check(trial: Trial) -> None:
    trial.check(FUNCTION)
