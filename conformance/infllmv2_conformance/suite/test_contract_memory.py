"""What holds for every function about memory, streams and settings, whatever it computes.

All calls of the suite are guarded (`guards.py`): arguments lie between red zones, fresh memory
holds NaN. The rules here vary that, and name what the guards find.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.cases import Case
from infllmv2_conformance.failure import fail
from infllmv2_conformance.guards import Loan, Surroundings, prime, same_bits, stale
from infllmv2_conformance.padding import with_padding
from infllmv2_conformance.returned import NAMES, check_own_memory, check_plain, overlap
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases
from infllmv2_conformance.streams import BUSY_DEFAULT, LATE_ARGUMENTS, on_busy_streams
from infllmv2_conformance.trial import Trial


@rule("contract.inputs-unchanged")
def test_inputs_unchanged(run: Runner) -> None:
    """Compare every argument with a copy made before the call."""

    def check(trial: Trial) -> None:
        trial.candidate.call(trial.function, **trial.arguments(trial.function))

    run.cases(cases(run), check, weight=0.2)


@rule("contract.fully-written")
def test_fully_written(run: Runner) -> None:
    """Let fresh memory hold NaN, plausible numbers, and then the results of another call."""

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        other = trial.redrawn()
        old = other.candidate.call(trial.function, **other.arguments(trial.function))
        parts = [x for x in (old if isinstance(old, tuple) else (old,)) if x is not None]
        for fresh in (torch.nan, 0.25, stale(parts)):
            with trial.candidate.surrounded(Surroundings(fresh=fresh)):
                prime(parts, 0.25 if callable(fresh) else fresh)
                trial.check(trial.function)
        with _torch_fills_memory():
            trial.check(trial.function)

    run.cases(cases(run), check, weight=0.3)


@rule("contract.red-zones")
def test_red_zones(run: Runner) -> None:
    """Surround every tensor with NaN, which sums show, and with what a maximum shows."""

    def check(trial: Trial) -> None:
        trial.candidate.call(trial.function, **trial.arguments(trial.function))  # sees writes
        if trial.is_sound():
            for zones in (torch.nan, 100.0):
                with trial.candidate.surrounded(Surroundings(zones=zones)):
                    trial.check(trial.function)

    run.cases(cases(run), check, weight=0.2)


@rule("contract.padding-not-read")
def test_padding_not_read(run: Runner) -> None:
    """Fill what no result may depend on: more rows and columns, sequences without queries."""

    def check(trial: Trial) -> None:
        if trial.is_sound():
            poison = (torch.nan, 100.0)[trial.case.seed % 2]
            given = with_padding(trial, trial.arguments(trial.function), poison)
            trial.check(trial.function, given)

    claims = run.candidate.capabilities
    drawn = cases(run, use_nope=run.function == "attention", dense=True)
    if claims.history and claims.empty_sequences:
        drawn = drawn.map(_with_idle_sequence)
    run.cases(drawn, check, weight=0.3)


@rule("contract.own-memory")
def test_own_memory(run: Runner) -> None:
    """Keep a result, overwrite its arguments, call again with other numbers, and look at it."""

    def check(trial: Trial) -> None:
        trial.candidate.call(trial.function, **trial.arguments(trial.function))
        if not trial.is_sound():
            return
        first, copies = _keep(trial)
        again, _ = _keep(trial.redrawn())
        for name, x in first.items():
            if name in again and overlap(x, again[name]):
                fail(f"two calls returned the result {name} in the same memory")
            if not same_bits(x, copies[name]):
                fail(f"the result {name} changed after it had been returned")

    run.cases(cases(run), check, weight=0.2)


@rule("contract.settings")
def test_settings(run: Runner) -> None:
    """Call under another default dtype, and in inference mode; settings are compared each time."""

    def check(trial: Trial) -> None:
        given = trial.arguments(trial.function)
        trial.candidate.call(trial.function, **given)
        if not trial.is_sound():
            return
        with _default_dtype((torch.bfloat16, torch.float64)[trial.case.choice % 2]):
            result = trial.candidate.call(trial.function, **given)
        trial.judge(trial.function, trial.split(trial.function, result), given)
        with torch.inference_mode():
            result = trial.candidate.call(trial.function, **given)
        trial.judge(trial.function, trial.split(trial.function, result), given)

    run.cases(cases(run), check, weight=0.2)


@rule("contract.streams")
def test_streams(run: Runner) -> None:
    """Call on a side stream that gets the arguments late, and beside a default stream in use."""
    if run.device.type != "cuda":
        run.unclaimed("a run on cuda, for only there is work queued in streams")

    def check(trial: Trial) -> None:
        if not trial.is_sound():
            return
        given = trial.arguments(trial.function)
        for busy in (LATE_ARGUMENTS, BUSY_DEFAULT):
            result = on_busy_streams(trial.candidate, trial.function, given, busy)
            trial.judge(trial.function, trial.split(trial.function, result), given)

    run.cases(cases(run), check, weight=0.2)


def _with_idle_sequence(case: Case) -> Case:
    """Take its queries from the last sequence of a batch."""
    *others, (_, num_keys) = case.sequences
    return case.with_(sequences=(*others, (0, num_keys))) if others else case


def _keep(trial: Trial) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Call, overwrite the arguments, and return the very results and copies of them."""
    loan = Loan(trial.arguments(trial.function))
    result: Any = trial.candidate.call_on(trial.function, **loan.arguments)
    parts = result if isinstance(result, tuple) else (result,)
    named = {n: x for n, x in zip(NAMES[trial.function], parts, strict=False) if x is not None}
    for name, x in named.items():
        check_plain(name, x)
        check_own_memory(name, x, {n: zone.buffer for n, zone in loan.zones.items()})
    copies = {name: x.clone() for name, x in named.items()}
    loan.spoil()
    return named, copies


@contextmanager
def _torch_fills_memory() -> Generator[None]:
    """Let PyTorch itself fill memory with NaN, also where compiled extensions ask for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations without a deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
